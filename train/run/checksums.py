"""Whether the arrays of a checkpoint are what was saved: flipped bits that Orbax restores silently.

A checksum is, of the array's 32-bit words x[i] and modulo 2^32: sum x[i] and sum (2 i + 1) x[i]. An
odd factor has an inverse, so a change to any single word shows in both; of arbitrary damage one in
2^64 does not. It is no protection against intent. On the device it takes one read of the array,
where a cryptographic digest would hold up training for longer than the checkpoint itself.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import tensorstore as ts
from jaxtyping import Array, UInt32

Checksums = dict[str, list[int]]
"""Leaf name -> its two sums."""


def _sums(x: Array) -> UInt32[Array, "2"]:
    words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    factors = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.stack([jnp.sum(words), jnp.sum(factors * words)])


@jax.jit
def _all_sums(leaves: list[Array]) -> list[UInt32[Array, "2"]]:
    return [_sums(x) for x in leaves]


def checksums(tree: object) -> Checksums:
    """Those of a tree's leaves, by dotted path. Leaves have 32 bits an element.

    In a run of several processes all of them call it, with arrays that are whole on each device.
    """
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
    sums = jax.device_get(_all_sums([leaf for _, leaf in named]))
    return {name: [int(s) for s in pair] for name, pair in zip(names, sums, strict=True)}


def damaged(found: Checksums, stored: Mapping[str, object]) -> list[str]:
    """The leaves whose checksum is not what is stored, and those that only one side has."""
    return sorted(n for n in found.keys() | stored.keys() if found.get(n) != stored.get(n))


def check_readable(item: Path) -> None:
    """Reads every array that Orbax wrote to a directory, one after another; ValueError where one
    cannot be.

    Orbax reads many at a time: where one fails, the others print what they run into.
    """
    drivers = {".zarray": "zarr", "zarr.json": "zarr3"}
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item.absolute()}/"}}
    for key in ts.KvStore.open(base).result().list().result():
        path, _, last = key.decode().rpartition("/")
        if last in drivers:
            spec = {"driver": drivers[last], "kvstore": {**base, "path": f"{path}/"}}
            ts.open(spec, open=True, read=True).result().read().result()
