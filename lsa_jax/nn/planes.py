"""The state's planes as the arrays that `pallas_kernels` reads: the same bytes, other names."""

from jaxtyping import Array, Float

from lsa_jax.cache import codec
from pallas_kernels.rows import Fp8Rows, Rows


def rows(planes: codec.Planes) -> Rows:
    """Entries [..., c]."""
    if isinstance(planes, codec.Fp8Entries):
        return Fp8Rows(planes.nope, planes.rope)
    assert isinstance(planes, codec.DensePlanes)
    return planes.values


def entries(rows: Rows) -> codec.Planes:
    """The inverse of `rows`."""
    if isinstance(rows, Fp8Rows):
        return codec.Fp8Entries(rows.nope, rows.rope)
    return codec.DensePlanes(rows)


def keys(planes: codec.Planes) -> tuple[Float[Array, "*n K"], Float[Array, "*n"] | None]:
    """Index keys as they are stored, and their scales where they have any."""
    if isinstance(planes, codec.Fp8Keys):
        return planes.values, planes.scale
    assert isinstance(planes, codec.DensePlanes)
    return planes.values, None
