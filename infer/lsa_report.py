"""`--report` and `--plot`: what was where, and when."""

import importlib
import importlib.util
import json
from typing import Any

from infer.lsa_session import LsaTurns
from infer.options import Options
from infer.report import circumstances, write
from lsa_jax.config import ConfigError
from lsa_jax.lsa import report
from lsa_jax.lsa.policy import default_threshold


def check_plot(options: Options) -> None:
    """Raises ConfigError where a plot is asked for that cannot be drawn."""
    if options.lsa.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, got none: pip install 'lsa_jax[plot]'")


def write_outputs(options: Options, session: LsaTurns) -> None:
    """Writes the files that were asked for; nothing where no prompt was admitted."""
    if session.lsa is None or not session.lsa.batch.events:
        return
    if options.lsa.report is not None:
        content = json.dumps(as_json(options, session), indent=1).encode()
        write(options.lsa.report, lambda file: file.write(content))
    if options.lsa.plot is not None:
        plot = importlib.import_module("lsa_jax.lsa.plot")  # needs matplotlib, which is optional
        batch = session.lsa.batch
        figure = plot.residency(
            batch.events,
            page_tokens=batch.cache.page_entries * batch.plan.cfg.csa_ratio,
            title=f"{batch.lsa.arm}, a cycle of at most {batch.lsa.lookahead} steps",
        )
        write(options.lsa.plot, lambda file: figure.savefig(file, format="png"))


def as_json(options: Options, session: LsaTurns) -> dict[str, Any]:
    """The content of `--report`: `lsa_jax.lsa.report.as_json`, and how it ran.

    `peak_device_bytes_above_weights` is null where the platform does not report it.
    """
    assert session.lsa is not None
    plan = session.plan
    content, threshold = report.as_json(session.lsa), plan.lsa.policy.threshold
    if plan.calibration is not None:
        threshold = "calibrated"
    elif threshold is None:
        score = "sigmoid" if session.indexer is None else session.indexer.cfg.score
        threshold = default_threshold(score)
    content["lsa"]["policy"]["threshold"] = threshold
    return {
        **content,
        "indexer": _indexer(session),
        "threshold": threshold,
        "calibrated_thresholds": list(plan.calibration.thresholds) if plan.calibration else None,
        "peak_device_bytes_above_weights": session.peak_bytes,
        **circumstances(options, session),
    }


def _indexer(session: LsaTurns) -> dict[str, str] | None:
    """How the memory indexer computes; None for arms without one."""
    if session.indexer is None:
        return None
    cfg = session.indexer.cfg
    dtype = session.indexer.retrievers[0].wq_a.dtype.name
    names = ("query_mode", "ensemble", "score", "lookback", "dilation", "falloff")
    return {"dtype": dtype, **{name: getattr(cfg, name) for name in names}}
