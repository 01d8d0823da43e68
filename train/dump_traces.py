"""Records traces of a backbone: `python -m train.dump_traces --ckpt DIR --prompts FILE.jsonl --out
DIR`.

Every prompt is prefilled and answered, greedily and with full attention, and becomes the document
`doc_NNNNN` of the trace set; `answers/doc_NNNNN.json` says what was answered. Documents that are
there already are left as they are, so a run that was stopped goes on when it is started again, and
one that another prompt or other settings left there is an error. Prompts with fewer than 3 entries,
without room in the model's context, or with an empty answer are skipped, a line each. Exit codes:
0, 2 after an error (one line), 130 after Ctrl-C.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lsa_jax import cli, model_io, shardings
from lsa_jax.checkpoint import manifest
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.text.tokenizer import Tokenizer
from train.dump_options import Options, parse
from train.outputs import check_directory
from train.traces import prompts_jsonl
from train.traces.columns import TraceError
from train.traces.prompts_jsonl import Line, Reading, token_ids
from train.traces.recording import Document, Nothing, RecordConfig, Recorded, Recorder
from train.traces.trace import open_trace
from train.traces.trace_info import weights_digest

_ANSWERS = "answers"


@dataclasses.dataclass(frozen=True)
class _Job:
    """A line that is to become a document."""

    name: str
    source: str
    line: Line


def settings(options: Options, config: RecordConfig) -> str:
    """What a trace depends on besides its prompt, in words: the same words, the same trace."""
    compute = options.compute()
    cache = options.cache(compute)
    votes = config.votes
    said = {
        "checkpoint": manifest.file_digest(options.ckpt / manifest.NAME)[:16],
        "answer": "replayed" if options.replay else "to the end" if options.ignore_eos else "own",
        "max-new-tokens": config.max_new_tokens,
        "targets": "+".join(map(str, config.targets)),
        "top-k": votes.top_k,
        "top-p": votes.top_p,
        "min-layers": votes.min_layers,
        "mass-eps": config.mass_eps,
        "dtype": compute.dtype,
        "kv": cache.kv_format,
        "simulate-quant": options.simulate_quant,
        "page-entries": cache.page_entries,
    }
    return ", ".join(f"{name} {value}" for name, value in said.items())


def find_jobs(options: Options, lines: Sequence[Line], words: str) -> tuple[list[_Job], int]:
    """The documents still to record, and how many are there already.

    Raises TraceError where a document of the name is of another prompt or other settings.
    """
    end = len(lines) if options.end_idx is None else options.end_idx
    if not 0 <= options.start_idx < end <= len(lines):
        span = f"{options.start_idx}..{end}"
        raise ConfigError(
            f"--start-idx and --end-idx must choose from the {len(lines)} prompts of"
            f" {options.prompts}, got {span}"
        )
    jobs = []
    for index, line in enumerate(lines[options.start_idx : end], options.start_idx):
        name = f"doc_{options.start + index:05d}"
        job = _Job(name, f"prompt {line.digest}, {words}", line)
        if (options.out / name).exists():
            _check_same(options.out / name, job, options.prompts)
        else:
            jobs.append(job)
    return jobs, end - options.start_idx - len(jobs)


def _check_same(path: Path, job: _Job, prompts: Path) -> None:
    found = open_trace(path, verify=False).info.source
    if found == job.source:
        return
    there, wanted = found.split(", "), job.source.split(", ")
    other = "; ".join(word for word in there if word not in wanted)
    ours = "; ".join(word for word in wanted if word not in there)
    what = f"{prompts}:{job.line.number} cannot become {path}, which is there already"
    raise TraceError(f"{what}: it has {other!r}, wanted {ours!r}")


def write_answer(
    path: Path, ids: Sequence[int], stopped: bool, tokenizer: Tokenizer | None
) -> None:
    """Notes what was answered, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {
        "ids": list(ids),
        "text": None if tokenizer is None else tokenizer.decode(ids),
        "stopped": stopped,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(said), encoding="utf-8")
    os.replace(partial, path)


def dump(options: Options) -> None:
    """Checks everything that can be checked cheaply, loads the model, and records."""
    check_directory("--out", options.out)
    cfg = model_io.read_config(options.ckpt)
    config = options.record(cfg)
    reading = Reading(vocab_size=cfg.vocab_size, thinking=options.thinking, replay=options.replay)
    lines = prompts_jsonl.scan(options.prompts, reading)
    tokenizer = None
    if any(line.needs_tokenizer for line in lines):
        tokenizer = Tokenizer.from_dir(options.ckpt, model_vocab_size=cfg.vocab_size)
    jobs, before = find_jobs(options, lines, settings(options, config))
    done: list[Recorded] = []
    if jobs:
        recorder = _recorder(options, cfg, config, tokenizer)
        for at, job in enumerate(jobs, 1):
            title = f"{job.name} ({at}/{len(jobs)})"
            with model_io.backend_refusals():
                recorded = _record(options, recorder, job, reading, tokenizer, title)
            done += [] if recorded is None else [recorded]
    print(summary(options.out, done, before, len(jobs) - len(done)))


def _recorder(
    options: Options, cfg: ModelConfig, config: RecordConfig, tokenizer: Tokenizer | None
) -> Recorder:
    """Loads the model. Answers end at the model's EOS and at the tokenizer's."""
    mesh = None if options.mesh is None else shardings.make_mesh(*options.mesh)
    compute = options.compute()
    stop = {cfg.eos_token_id} | (set() if tokenizer is None else {tokenizer.eos_id})
    print(f"loading {options.ckpt}", file=sys.stderr)
    return Recorder(
        model_io.load_model(options.ckpt, compute=compute, mesh=mesh),
        options.cache(compute),
        config,
        stop=() if options.ignore_eos else sorted(stop),
        prefill_chunk=options.prefill_chunk,
        mesh=mesh,
        backbone=cfg,
        weights=weights_digest(options.ckpt),
    )


def _record(
    options: Options,
    recorder: Recorder,
    job: _Job,
    reading: Reading,
    tokenizer: Tokenizer | None,
    title: str,
) -> Recorded | None:
    """Records one document; a line and None where there is nothing to record."""
    prompt = prompts_jsonl.load(options.prompts, job.line, reading)
    ids = token_ids(prompt.content, tokenizer)
    answer = None if prompt.answer is None else token_ids(prompt.answer, tokenizer)
    document = Document(job.name, job.source, ids, answer)

    def note(ids: Sequence[int], stopped: bool) -> None:
        write_answer(options.out / _ANSWERS / f"{job.name}.json", ids, stopped, tokenizer)

    try:
        with cli.token_progress(len(ids) + options.max_new_tokens, title) as progress:
            return recorder.record(document, options.out, progress, note)
    except Nothing as why:
        print(f"{options.prompts}:{job.line.number}: skipped: {why}")
        return None


def summary(out: Path, done: Sequence[Recorded], before: int, skipped: int) -> str:
    """What a run did, in a line."""
    tokens, labels = sum(len(d.answer) for d in done), sum(d.labels for d in done)
    size = sum(d.nbytes for d in done) / 1e6
    mass, kept = sum(d.mass for d in done), sum(d.kept_mass for d in done)
    counts = f"{len(done)} documents, {tokens:,} tokens, {labels:,} labels, {size:,.2f} MB"
    share = f", {kept / mass:.2%} of the attention mass" if mass else ""
    return f"{out}: {counts}{share}; {before} were there already, {skipped} skipped"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse(argv, __doc__ or "")
    cli.show_log()
    return cli.exit_code(lambda: dump(options), interrupted="interrupted; run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
