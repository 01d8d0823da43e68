"""Hopper kernels: one query a row (memory-bound decode), or many (compute-bound prefill)."""

import functools

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.index_score import mosaic_gpu_chunk, mosaic_gpu_decode
from pallas_kernels.index_score.mosaic_gpu_tile import prepare

# What a warpgroup holds in registers decides how many fit: three with 128 heads, four with 64.
DECODE_GROUPS = {64: 4, 128: 3}


@functools.partial(
    jax.jit,
    static_argnames=(
        *("groups", "stages", "splits", "queries", "key_tiles", "query_stages", "interpret"),
    ),
)
def index_score(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Float[Array, "*n K"],
    scale: Float[Array, "*n"] | None,
    lengths: Int[Array, "B T"] | None,
    table: Int[Array, "B pages"] | None,
    *,
    groups: int | None = None,
    stages: int | None = None,
    splits: int | None = None,
    queries: int = mosaic_gpu_chunk.QUERIES,
    key_tiles: int | None = None,
    query_stages: int = mosaic_gpu_chunk.STAGES,
    interpret: bool = False,
) -> Float[Array, "B T N"]:
    """See the package's `index_score`. Jitted, so that a model's layers lower one kernel once.

    `groups` warpgroups a block. For one query a row: `stages` tiles in flight for each, `splits`
    blocks a row. For several: `queries` a block, `key_tiles` tiles of keys for each warpgroup,
    `query_stages` queries in flight.
    """
    count = keys.shape[1] * (1 if table is None else table.shape[1])
    call = prepare(q, w, keys, scale, lengths, table)
    heads = q.shape[2]
    if q.shape[1] == 1:
        groups = groups or DECODE_GROUPS[heads]
        sizes = {"groups": groups, "stages": stages, "splits": splits}
        out = mosaic_gpu_decode.scores(call, **sizes, interpret=interpret)
    else:
        groups = groups or mosaic_gpu_chunk.GROUPS
        key_tiles = key_tiles or mosaic_gpu_chunk.KEY_TILES[heads]
        sizes = {"groups": groups, "key_tiles": key_tiles, "queries": queries}
        out = mosaic_gpu_chunk.scores(call, **sizes, stages=query_stages, interpret=interpret)
    return out if out.shape[2] == count else out[:, :, :count]
