"""Mixing weights of a hyper-connection site: two sigmoids and a Sinkhorn normalisation."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.hc_mix import mosaic_gpu, reference

IMPLEMENTATIONS = {dispatch.XLA: reference.hc_mix, dispatch.MOSAIC_GPU: mosaic_gpu.hc_mix}


def hc_mix(
    z: Float[Array, "N k"],
    squares: Float[Array, " N"],
    scale: Float[Array, "3"],
    base: Float[Array, " k"],
    *,
    streams: int,
    iterations: int,
    eps: float,
    width: int,
    norm_eps: float,
    backend: str | None = None,
) -> Float[Array, "N k"]:
    """Projections z (k = (2 + n) n for n streams) -> pre [n], post [n], comb [n * n] in one row.

    z is projected from streams as they are: their RMS norm is a factor, `squares` the sum of the
    squares of their `width` values. pre = sigmoid + eps; post = 2 sigmoid; comb = row softmax, then
    `iterations` column and `iterations - 1` row normalisations in turn, each with eps (DeepSeek-V4
    spec 2.2). All float32.
    """
    sizes = {"streams": streams, "iterations": iterations, "eps": eps}
    sizes |= {"width": width, "norm_eps": norm_eps}
    return dispatch.run("hc_mix", IMPLEMENTATIONS, backend, z, squares, scale, base, **sizes)
