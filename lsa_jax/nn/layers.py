"""Leaves -> modules: the parameter view, linear maps over dense, fp8 or fp4 weights, RMSNorm."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lsa_jax import quant
from lsa_jax.config import ComputeConfig
from lsa_jax.parameters import ParamSpec
from pallas_kernels import dispatch, quant_matmul

FEW_ROWS = 256  # up to which reading a weight takes longer than multiplying with it

Leaf = Any  # jax.Array, or jax.ShapeDtypeStruct while a model is being planned


class Leaves:
    """A view of the checkpoint leaves below one module path.

    `leaves` maps dot-joined paths to arrays (or shapes), `table` is `parameter_table(cfg)`.
    """

    def __init__(
        self, leaves: Mapping[str, Leaf], table: Mapping[str, ParamSpec], prefix: str = ""
    ):
        self._leaves, self._table, self._prefix = leaves, table, prefix

    def sub(self, name: str) -> "Leaves":
        """The view one level down."""
        return Leaves(self._leaves, self._table, f"{self._prefix}{name}.")

    def subs(self, name: str, count: int) -> Iterator["Leaves"]:
        """The views of a numbered list of modules."""
        return (self.sub(f"{name}.{i}") for i in range(count))

    def spec(self, name: str) -> ParamSpec:
        """Table row of a parameter."""
        return self._table[self._prefix + name]

    def has(self, name: str) -> bool:
        """Whether the model has this parameter, or the checkpoint this scale."""
        path = self._prefix + name
        return path in self._table or path in self._leaves

    def param(self, name: str) -> nnx.Param:
        """The leaf as a parameter that carries its logical axes."""
        return nnx.Param(self._leaves[self._prefix + name], axes=self.spec(name).axes)

    def scale(self, weight_name: str = "weight") -> nnx.Param | None:
        """The ue8m0 scale grid beside a quantised weight; None beside a dense one."""
        path = self._prefix + weight_name.removesuffix("weight") + "scale"
        if path not in self._leaves:
            return None
        return nnx.Param(self._leaves[path], axes=self.spec(weight_name).axes)


def precision(dtype: Any) -> jax.lax.Precision:
    """Float32 means float32: accelerators otherwise multiply it in tf32 or bf16."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def matmul(x: Array, w: Array, out_dtype: Any = None) -> Array:
    """x [..., in] times w [out, in] -> [..., out], accumulated in float32."""
    y = jax.lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype if out_dtype is None else out_dtype)


@jax.custom_vjp
def take_rows(table: Float[Array, "V k"], index: Int[Array, "*n"]) -> Float[Array, "*n k"]:
    """Rows of a table. The gradient is a matmul with one-hot rows, summed in float32: where rows
    repeat, adding them up in place takes accelerators many times as long."""
    return table[index]


def _rows_forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[index], (table, index)


def _rows_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    table, index = kept
    rows = cotangent.reshape(-1, table.shape[1])
    chosen = jax.nn.one_hot(index.reshape(-1), len(table), axis=0, dtype=rows.dtype)
    return matmul(chosen, rows.T, jnp.float32).astype(table.dtype), None


take_rows.defvjp(_rows_forward, _rows_backward)


class Linear(nnx.Module):
    """y = x . W^T without bias; W [out, in] is dense, fp8 128x128 or packed fp4 1x32 (spec 9.1).

    Quantised weights stay quantised on the device and are dequantised, exactly, inside the matmul.
    """

    def __init__(self, leaves: Leaves, compute: ComputeConfig, *, quantise_input: bool = True):
        spec = leaves.spec("weight")
        self.compute = compute
        self.in_features = spec.shape[-1]
        self.simulate = compute.simulate_activations and quantise_input and spec.kind == "linear"
        self.weight = leaves.param("weight")
        self.scale = leaves.scale()

    def dense(self, dtype: Any) -> Array:
        """The weight [out, in] in `dtype`."""
        scale = None if self.scale is None else self.scale[...]
        return quant.dequantise(self.weight[...], scale, self.in_features, dtype)

    def __call__(self, x: Float[Array, "*n in"], out_dtype: Any = None) -> Float[Array, "*n out"]:
        """x times the weight, in x's dtype or `out_dtype`; sums are float32."""
        if self.simulate:
            x = quant.fp8_round(x, group=128)
        rows = math.prod(x.shape[:-1])
        if self.scale is None or rows > FEW_ROWS:
            return matmul(x, self.dense(x.dtype), out_dtype)
        y = quant_matmul.quant_matmul(
            x.reshape(rows, self.in_features),
            self.weight[...],
            self.scale[...],
            out_dtype=out_dtype,
            backend=dispatch.of_model(quant_matmul.IMPLEMENTATIONS, self.compute.kernel_backend),
        )
        return y.reshape(*x.shape[:-1], -1)


def rms_normalise(x: Array, eps: float, weight: Array | None = None) -> Array:
    """g * x * rsqrt(mean(x^2) + eps) over the last axis, in float32 (spec 0)."""
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight.astype(jnp.float32)


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned gain; one cast at the end (spec 0, 2.5)."""

    def __init__(self, leaves: Leaves, eps: float):
        self.eps = eps
        self.weight = leaves.param("weight")

    def __call__(self, x: Float[Array, "*n d"], out_dtype: Any = None) -> Float[Array, "*n d"]:
        """The normalised x, in its dtype or `out_dtype`."""
        y = rms_normalise(x, self.eps, self.weight[...])
        return y.astype(x.dtype if out_dtype is None else out_dtype)
