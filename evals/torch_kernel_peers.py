"""Torch's versions of our operations, eager and compiled, for `pallas_kernels.bench` to time.

    python -m pallas_kernels.bench --peers evals.torch_kernel_peers

Written as a torch user would write them from the operations' docstrings: bfloat16 products, float32
softmax and sums, quantised entries and keys dequantised where they are read, long inputs in blocks.
They read the same device arrays. Needs torch with CUDA beside JAX; set
XLA_PYTHON_CLIENT_PREALLOCATE=false and XLA_PYTHON_CLIENT_MEM_FRACTION=.6 so that both have memory.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

QUERIES = 256  # of a prompt at once, where a matrix of queries and keys would not fit
LARGE = 1 << 31  # elements of such a matrix from which that is so


def entries_of(rows: Any, group: int, lead: int = 2) -> Tensor:
    """Entries [*, c] in bfloat16, from arrays (perhaps [*, c / 128, 128]) or fp8 planes, behind
    `lead` axes."""
    if not hasattr(rows, "nope"):
        return rows.flatten(lead)
    nope, rope = rows.nope.flatten(lead), rows.rope
    dims = nope.shape[-1] * group // (group + 1) // group * group
    codes = nope[..., :dims].view(torch.float8_e4m3fn).to(torch.bfloat16)
    bits = nope[..., dims : dims + dims // group].to(torch.int32) << 23
    scale = bits.view(torch.float32).to(torch.bfloat16)
    values = codes.unflatten(-1, (-1, group)) * scale[..., None]
    return torch.cat([values.flatten(-2), rope], -1)


def attend(q: Tensor, kv: Tensor, seen: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Heads [*, H, c] over keys that are values [*, n, c], where `seen` [*, n]; a sink per head."""
    kv = torch.where(seen[..., None], kv, 0)
    logits = torch.matmul(q, kv.transpose(-1, -2)).float() * scale
    logits = logits.masked_fill(~seen[..., None, :], float("-inf"))
    none = sink[:, None].expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, none], -1).softmax(-1)[..., :-1]
    return torch.matmul(weights.to(q.dtype), kv)


def index_score(arguments: Mapping[str, Tensor]) -> Tensor:
    """Scores [B, T, N]."""
    keys, scale = arguments["keys"], arguments.get("scale")
    if "table" in arguments:
        at = arguments["table"].clamp(min=0)
        keys = keys[at].flatten(1, 2)
        scale = None if scale is None else scale[at].flatten(1, 2)
    keys = keys.to(torch.bfloat16)
    q, w, lengths = arguments["q"].to(torch.bfloat16), arguments["w"], arguments["lengths"]
    many = q.shape[0] * q.shape[1] * q.shape[2] * keys.shape[1] > LARGE
    out = []
    for i in range(0, q.shape[1], QUERIES if many else q.shape[1]):
        part = slice(i, i + QUERIES if many else None)
        dots = torch.einsum("bthk,bnk->bthn", q[:, part], keys)
        out.append(torch.einsum("bthn,bth->btn", dots.relu().float(), w[:, part]))
    scores = torch.cat(out, 1)
    scores = scores if scale is None else scores * scale[:, None]
    seen = torch.arange(keys.shape[1], device=keys.device) < lengths[..., None]
    return scores.masked_fill(~seen, float("-inf"))


def top_k(scores: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """Columns [R, k]."""
    if visible.ndim == 1:
        visible = torch.arange(scores.shape[1], device=scores.device) < visible[:, None]
    return torch.topk(scores.masked_fill(~visible, float("-inf")), k, sorted=False).indices


def sparse_decode(
    q: Tensor,
    window: Tensor,
    window_count: Tensor,
    rows: Any,
    index: Tensor,
    valid: Tensor,
    sink: Tensor,
    *,
    scale: float,
    group: int,
    own: bool = False,
) -> Tensor:
    """Output [B, H, c]."""
    at = torch.where(valid, index, 0).long()
    if own:
        batch = torch.arange(len(at), device=at.device)[:, None]
        picked = _map(lambda x: x[batch, at], rows)
    else:
        picked = _map(lambda x: x.flatten(0, 1)[at], rows)
    near = torch.arange(window.shape[1], device=q.device) < window_count[:, None]
    kv = torch.cat([window, entries_of(picked, group)], 1)
    return attend(q, kv, torch.cat([near, valid], 1), sink, scale)


def dense_decode(
    q: Tensor,
    window: Tensor,
    window_count: Tensor,
    rows: Any,
    count: Tensor,
    sink: Tensor,
    *,
    scale: float,
    group: int,
) -> Tensor:
    """Output [B, H, c]."""
    stored = entries_of(rows, group)
    near = torch.arange(window.shape[1], device=q.device) < window_count[:, None]
    seen = torch.arange(stored.shape[1], device=q.device) < count[:, None]
    kv = torch.cat([window, stored], 1)
    return attend(q, kv, torch.cat([near, seen], 1), sink, scale)


def sparse_prefill(
    q: Tensor,
    past: Tensor,
    kv: Tensor,
    start: Tensor,
    rows: Any,
    index: Tensor,
    valid: Tensor,
    sink: Tensor,
    *,
    scale: float,
    group: int,
) -> Tensor:
    """Output [B, T, H, c]."""
    raw, width = torch.cat([past, kv], 1), past.shape[1]
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    out = []
    for i in range(0, q.shape[1], QUERIES):
        part = slice(i, i + QUERIES)
        at = torch.where(valid[:, part], index[:, part], 0).long()
        picked = entries_of(_map(lambda x, at=at: x[batch, at], rows), group, lead=3)
        near = raw[:, i + 1 :].unfold(1, width, 1)[:, : at.shape[1]].transpose(-1, -2)
        place = torch.arange(i, i + at.shape[1], device=q.device)[:, None]
        place = place + 1 - width + torch.arange(width, device=q.device)
        seen = torch.cat([start[:, None, None] + place >= 0, valid[:, part]], -1)
        out.append(attend(q[:, part], torch.cat([near, picked], 2), seen, sink, scale))
    return torch.cat(out, 1)


def dense_prefill(
    q: Tensor,
    past: Tensor,
    kv: Tensor,
    start: Tensor,
    rows: Any,
    sink: Tensor,
    *,
    ratio: int,
    scale: float,
    group: int,
) -> Tensor:
    """Output [B, T, H, c]."""
    raw, width = torch.cat([past, kv], 1), past.shape[1]
    stored = raw[:, :0] if rows is None else entries_of(rows, group)
    entry = torch.arange(stored.shape[1], device=q.device)
    out = []
    for i in range(0, q.shape[1], QUERIES):
        queries = q[:, i : i + QUERIES]
        count = queries.shape[1]
        position = start[:, None, None] + torch.arange(i, i + count, device=q.device)[:, None]
        key = start[:, None, None] + torch.arange(i, i + count + width, device=q.device) - width
        near = (key <= position) & (key > position - width) & (key >= 0)
        seen = torch.cat([near, entry < (position + 1) // ratio], -1)
        keys = torch.cat([raw[:, i : i + count + width], stored], 1)
        keys = torch.where(seen.any(1)[..., None], keys, 0)
        logits = torch.einsum("bthc,bnc->bthn", queries, keys).float() * scale
        logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
        none = sink[:, None].expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, none], -1).softmax(-1)[..., :-1]
        out.append(torch.einsum("bthn,bnc->bthc", weights.to(q.dtype), keys))
    return torch.cat(out, 1)


def page_gather(pool: Tensor, *rest: Tensor) -> Tensor:
    """Records out of a pool by slot; with records, into one (in place)."""
    if len(rest) == 1:
        return pool.index_select(0, rest[0].clamp(0, len(pool) - 1))
    records, slots = rest
    return pool.index_copy_(0, slots.long(), records)


def grouped_matmul(x: Tensor, w: Tensor, group_sizes: Tensor) -> Tensor:
    """Rows times their group's matrix, by torch's own grouped matmul."""
    ends = group_sizes.cumsum(0, dtype=torch.int32)
    return functional.grouped_mm(x, w.transpose(1, 2), offs=ends)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "index_score": index_score,
    "top_k": top_k,
    "sparse_decode": sparse_decode,
    "dense_decode": dense_decode,
    "sparse_prefill": sparse_prefill,
    "dense_prefill": dense_prefill,
    "page_gather": page_gather,
    "grouped_matmul": grouped_matmul,
}


def _map(change: Callable[[Tensor], Tensor], rows: Any) -> Any:
    """Of every plane of entries."""
    return change(rows) if isinstance(rows, Tensor) else type(rows)(*map(change, rows))


class Peer:
    """One of the functions above on a case's arguments."""

    def __init__(self, case: Any, compiled: bool):
        self.name = "torch compiled" if compiled else "torch"
        run = functools.partial(FUNCTIONS[case.op], **case.static)
        self.run = torch.compile(run, dynamic=False) if compiled else run

    def take(self, args: tuple[Any, ...]) -> Any:
        """The same memory as tensors; one-byte floats and booleans are copied."""
        import jax

        return jax.tree.map(_tensor, args)

    def call(self, taken: Any) -> Any:
        """The operation."""
        with torch.inference_mode():
            return self.run(*taken)

    def finish(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize()


def _tensor(x: Any) -> Tensor:
    import jax
    import jax.numpy as jnp

    if x.dtype == jnp.float8_e4m3fn:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint8)
        return torch.from_dlpack(bits).view(torch.float8_e4m3fn)
    if x.dtype == jnp.bool_:
        return torch.from_dlpack(x.astype(jnp.uint8)).bool()
    return torch.from_dlpack(x)


def peers(case: Any) -> list[Callable[[], Peer]]:
    """Ways to make the peers of a case; none where torch has no version of its operation."""
    if case.op not in FUNCTIONS or not torch.cuda.is_available():
        return []
    return [functools.partial(Peer, case, compiled) for compiled in (False, True)]
