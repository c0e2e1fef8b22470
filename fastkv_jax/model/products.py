"""Rows times the matrices of one layer, as the layers need them: XLA's products, or one kernel for each line here.

Weights keep the checkpoint's layout, [O, I]: a decode step streams whole rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

import kernels_pallas
from kernels_pallas.arithmetic import rms_norm


@dataclass(frozen=True)
class Stacked:
    """One layer's weights, still in the stack of all layers: for kernels that read them there."""

    values: Float[Array, "L ..."]
    index: Int[Array, ""]
    kernels: Literal["gpu"]


def here(param: nnx.Param) -> Array:
    """A layer's own weights, cut out of their stack if they still are in it."""
    value: Any = param.get_value()
    if isinstance(value, Stacked):
        return lax.dynamic_index_in_dim(value.values, value.index, keepdims=False)
    return value


def normed_products(
    x: Float[Array, "*S I"],
    norm: nnx.Param,
    eps: float,
    weights: Sequence[nnx.Param],
    biases: Sequence[nnx.Param | None],
) -> tuple[Float[Array, "*S _"], ...]:
    """rms_norm(x) @ weight.T + bias, for each of the weights."""
    stack = _stacked(norm)
    if stack is not None:
        found = kernels_pallas.projections(
            _rows(x),
            kernels_pallas.Norm(stack.values, eps),
            [_values(w) for w in weights],
            stack.index,
            biases=[_values(b) for b in biases],
            implementation=stack.kernels,
        )
        return tuple(y.reshape(*x.shape[:-1], -1) for y in found)
    x = rms_norm(x, norm[...], eps)
    return tuple(_product(x, w, b) for w, b in zip(weights, biases, strict=True))


def gated_product(
    x: Float[Array, "*S I"], norm: nnx.Param, eps: float, gate: nnx.Param, up: nnx.Param
) -> Float[Array, "*S O"]:
    """silu(y @ gate.T) * (y @ up.T) of y = rms_norm(x)."""
    stack = _stacked(norm)
    if stack is not None:
        normed = kernels_pallas.Norm(stack.values, eps)
        made = kernels_pallas.gated(
            _rows(x), normed, _values(gate), _values(up), stack.index, implementation=stack.kernels
        )
        return made.reshape(*x.shape[:-1], -1)
    y = rms_norm(x, norm[...], eps)
    return jax.nn.silu(_product(y, gate, None)) * _product(y, up, None)


def plus_product(
    x: Float[Array, "*S O"], y: Float[Array, "*S I"], weight: nnx.Param, bias: nnx.Param | None = None
) -> Float[Array, "*S O"]:
    """x + y @ weight.T + bias."""
    stack = _stacked(weight)
    if stack is not None:
        made = kernels_pallas.linear(
            _rows(y), stack.values, stack.index, bias=_values(bias), residual=_rows(x), implementation=stack.kernels
        )
        return made.reshape(x.shape)
    return x + _product(y, weight, bias)


def _product(x: Float[Array, "*S I"], weight: nnx.Param, bias: nnx.Param | None) -> Float[Array, "*S O"]:
    y = jnp.einsum("...i,oi->...o", x, weight[...])
    return y if bias is None else y + jnp.broadcast_to(bias[...], y.shape)


def _stacked(param: nnx.Param) -> Stacked | None:
    value: Any = param.get_value()
    return value if isinstance(value, Stacked) else None


def _values(param: nnx.Param | None) -> Any:
    value: Any = None if param is None else param.get_value()
    return None if value is None else value.values


def _rows(x: Float[Array, "*S I"]) -> Float[Array, "B I"]:
    return x.reshape(-1, x.shape[-1])
