"""What a trace is of, its index keys, and what follows from positions alone. NumPy only."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import ml_dtypes
import numpy as np

from lsa_jax import config_io
from lsa_jax.checkpoint import manifest
from lsa_jax.config import ModelConfig, YarnConfig
from lsa_jax.config_checks import number, refusal
from train.traces.columns import TraceError
from train.traces.votes import MAX_LAYERS, VoteConfig

PARTIAL = ".partial"  # ends the name of a document's directory until it is finished
KeyFormat = Literal["fp8", "bfloat16", "float32"]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyRope:
    """How the backbone places its index keys: what an indexer's queries must share with them.

    `norm_eps` is that of the backbone's norms, which its native indexers use too.
    """

    rope_head_dim: int
    rope_theta: float
    yarn: YarnConfig | None
    norm_eps: float

    def __post_init__(self) -> None:
        if number("trace.rope.rope_head_dim", self.rope_head_dim, int) < 1:
            raise refusal("trace.rope.rope_head_dim", self.rope_head_dim, ">= 1")
        for name in ("rope_theta", "norm_eps"):
            if number(f"trace.rope.{name}", getattr(self, name), float) <= 0:
                raise refusal(f"trace.rope.{name}", getattr(self, name), "> 0")

    @classmethod
    def of_model(cls, model: ModelConfig) -> Self:
        """That of a backbone."""
        return cls(
            rope_head_dim=model.qk_rope_head_dim,
            rope_theta=model.compress_rope_theta,
            yarn=model.yarn,
            norm_eps=model.rms_norm_eps,
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` and JSON made of one; raises ConfigError or TypeError."""
        yarn = raw["yarn"]
        return cls(**{**raw, "yarn": None if yarn is None else YarnConfig(**yarn)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceInfo:
    """What a trace is of.

    `model` is the `fingerprint` of the backbone's configuration and `weights` the `weights_digest`
    of its checkpoint, None where they are not known: of imported documents, of models that came
    from no checkpoint, and, for weights, of traces written before schema 2. `source` says where the
    document comes from, in words of its writer. The first `prompt_tokens` tokens are not recorded.
    `dropped_labels` are votes for entries that the document does not have.
    """

    name: str
    source: str
    model: str | None
    target_layers: tuple[int, ...]
    csa_layers: int
    csa_ratio: int
    page_entries: int
    prompt_tokens: int
    rope: KeyRope
    votes: VoteConfig
    dropped_labels: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.endswith(PARTIAL):
            raise refusal("trace.name", self.name, "letters, digits, '.', '_' and '-'")
        for field in ("csa_layers", "csa_ratio", "page_entries"):
            if number(f"trace.{field}", getattr(self, field), int) < 1:
                raise refusal(f"trace.{field}", getattr(self, field), ">= 1")
        for field in ("prompt_tokens", "dropped_labels"):
            if number(f"trace.{field}", getattr(self, field), int) < 0:
                raise refusal(f"trace.{field}", getattr(self, field), ">= 0")
        for field in ("model", "weights"):
            if not isinstance(getattr(self, field), str | None):
                raise refusal(f"trace.{field}", getattr(self, field), "a digest, or null")
        if self.csa_layers > MAX_LAYERS:
            raise refusal("trace.csa_layers", self.csa_layers, f"<= {MAX_LAYERS}")
        targets = self.target_layers
        ascending = bool(targets) and list(targets) == sorted(set(targets))
        if not ascending or not 0 <= targets[0] <= targets[-1] < self.csa_layers:
            wanted = f"distinct ascending CSA ordinals in 0..{self.csa_layers - 1}"
            raise refusal("trace.target_layers", targets, wanted)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` and JSON made of one; raises ConfigError or TypeError."""
        parts = {
            "target_layers": tuple(raw["target_layers"]),
            "rope": KeyRope.from_json(raw["rope"]),
            "votes": VoteConfig(**raw["votes"]),
        }
        return cls(**{**raw, **parts})


def indexer_fields(info: TraceInfo, *, hidden_size: int, head_dim: int) -> dict[str, Any]:
    """What the traces decide of an `IndexerConfig`, by its fields."""
    rope = {field.name: getattr(info.rope, field.name) for field in dataclasses.fields(KeyRope)}
    sizes = {"hidden_size": hidden_size, "head_dim": head_dim}
    return {"target_layers": info.target_layers, **sizes, **rope}


@dataclasses.dataclass(frozen=True)
class Keys:
    """Index keys [N, L, K]: e4m3 with a scale [N, L] each, or bfloat16 or float32 without."""

    values: np.ndarray
    scale: np.ndarray | None

    def __post_init__(self) -> None:
        values, scale = self.values, self.scale
        if self.format not in get_args(KeyFormat) or values.ndim != 3:
            raise TraceError(f"keys must be [N, L, K] of {get_args(KeyFormat)}, got {values.dtype}")
        wanted = values.shape[:2] if self.format == "fp8" else None
        if (scale.shape if scale is not None else None) != wanted:
            raise TraceError(f"key_scale must have shape {wanted}, as the keys are {self.format}")

    def check(self) -> None:
        """Raises TraceError where a key or scale is not finite, or a scale negative."""
        if self.scale is not None and not (np.isfinite(self.scale) & (self.scale >= 0)).all():
            raise TraceError("key_scale must be finite and >= 0")
        if not finite(self.values):
            raise TraceError("keys must be finite")

    @property
    def format(self) -> str:
        """The key format, named as a cache's."""
        return "fp8" if self.values.dtype == E4M3 else self.values.dtype.name

    def dequantised(self) -> np.ndarray:
        """The keys in float32."""
        values = self.values.astype(np.float32)
        return values if self.scale is None else values * self.scale[..., None]


def finite(x: np.ndarray) -> bool:
    """Whether e4m3, bfloat16, or other floats are all finite; by their bits, as that is faster."""
    exponents = {1: (np.uint8, 0x7F), 2: (np.uint16, 0x7F80)}  # e4m3 has NaN alone
    if x.dtype not in (E4M3, np.dtype(ml_dtypes.bfloat16)):
        return bool(np.isfinite(x).all())
    kind, mask = exponents[x.dtype.itemsize]
    return bool(np.all((x.view(kind) & kind(mask)) != mask))


def digest(value: object) -> str:
    """Digest of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(model: ModelConfig) -> str:
    """Digest of a backbone's configuration: traces of equal ones can be mixed."""
    return digest(config_io.to_json(model))


def weights_digest(checkpoint: Path) -> str:
    """Digest of a converted checkpoint's parameters, from those in its manifest; no array is read.

    Raises as `manifest.read` does.
    """
    found = manifest.read(checkpoint)
    parts = {
        path: [list(leaf.shape), leaf.dtype.name, found.chunks[path]]
        for path, leaf in found.leaves.items()
    }
    return digest(parts)


def formation_steps(positions: np.ndarray, entries: int, csa_ratio: int) -> np.ndarray:
    """The recorded token at whose step each entry is complete, int32 [entries], ascending.

    Entry j exists for a decision at token t, which has been fed, where `formed_at[j] <= t`. It is
    0 for entries of the prompt too, and T for those completed after the recording.
    """
    last_tokens = np.arange(1, entries + 1) * csa_ratio - 1
    return np.searchsorted(positions, last_tokens).astype(np.int32)


def check_consecutive(path: Path, positions: np.ndarray) -> None:
    """TraceError where tokens are missing between those of a trace: an indexer that looks back
    would ask others than when it serves."""
    steps = np.diff(positions)
    gaps = np.flatnonzero(steps != 1)
    if len(gaps):
        wanted, got = "consecutive for indexer.lookback > 1", f"a step of {steps[gaps[0]]}"
        raise TraceError(f"{path}: positions must be {wanted}, got {got} at {gaps[0]}")
