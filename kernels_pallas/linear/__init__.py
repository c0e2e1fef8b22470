"""A few rows times matrices of one layer of a stack: what a decode step does with weights, in one launch a line.

    projections    norm(x) times several matrices          queries, keys and values
    gated          silu(norm(x) gate) * (norm(x) up)       the wide half of the MLP
    linear         residual + x times a matrix             what goes back to the residual stream

On a GPU XLA would copy a layer's matrix out of the stack first; the kernels read it where it is. There are none for a
TPU, where XLA reads it in place as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.arithmetic import rms_norm
from kernels_pallas.dispatch import Implementation, kernels
from kernels_pallas.linear import reference

MOST_ROWS = 64  # with more, a product is worth a library's kernel and the copy before it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm in front of a product."""

    weight: Float[Array, "L I"]
    eps: float = field(metadata={"static": True})


def linear(
    x: Float[Array, "B I"],
    weight: Float[Array, "L O I"],
    layer: Int[Array, ""],
    *,
    bias: Float[Array, "L O"] | None = None,
    residual: Float[Array, "B O"] | None = None,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Float[Array, "B O"]:
    """residual + x @ weight[layer].T + bias[layer], summed in float32, in x's dtype.

    Raises `ValueError` where the shapes or dtypes do not fit.
    """
    _check("linear", x, [weight], biases=[bias], residual=residual)
    if _is_reference(implementation, x):
        return reference.linear(x, weight, layer, bias, residual)
    run = kernels("linear", implementation).products
    return run(x, None, (weight,), (bias,), residual, layer, interpret=interpret)[0]


def projections(
    x: Float[Array, "B I"],
    norm: Norm,
    weights: Sequence[Float[Array, "L _ I"]],
    layer: Int[Array, ""],
    *,
    biases: Sequence[Float[Array, "L _"] | None] | None = None,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> tuple[Float[Array, "B _"], ...]:
    """rms_norm(x) @ weight[layer].T + bias[layer] for each of the matrices, summed in float32, in x's dtype.

    Raises `ValueError` where the shapes or dtypes do not fit.
    """
    biases = tuple(biases or (None,) * len(weights))
    _check("projections", x, weights, norm, biases)
    if _is_reference(implementation, x):
        return reference.projections(x, norm, weights, layer, biases)
    x, inside = _norm_inside(x, norm, layer)
    run = kernels("linear", implementation).products
    return run(x, inside, tuple(weights), biases, None, layer, interpret=interpret)


def gated(
    x: Float[Array, "B I"],
    norm: Norm,
    gate: Float[Array, "L O I"],
    up: Float[Array, "L O I"],
    layer: Int[Array, ""],
    *,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Float[Array, "B O"]:
    """silu(rms_norm(x) @ gate[layer].T) * (rms_norm(x) @ up[layer].T), summed in float32, in x's dtype.

    Raises `ValueError` where the shapes or dtypes do not fit.
    """
    _check("gated", x, [gate, up], norm)
    if gate.shape != up.shape:
        raise ValueError(f"gated: a gate of {list(gate.shape)} and {list(up.shape)}")
    if _is_reference(implementation, x):
        return reference.gated(x, norm, gate, up, layer)
    x, inside = _norm_inside(x, norm, layer)
    return kernels("linear", implementation).gated(x, inside, gate, up, layer, interpret=interpret)


def _is_reference(implementation: Implementation, x: jax.Array) -> bool:
    return implementation in ("reference", "tpu") or (implementation == "gpu" and x.shape[0] > MOST_ROWS)


def _norm_inside(x: jax.Array, norm: Norm, layer: jax.Array) -> tuple[jax.Array, Norm | None]:
    """The kernels multiply by the norm's weight first and by 1 / rms last: float16 could overflow between."""
    if x.dtype != jnp.float16:
        return x, norm
    return rms_norm(x, reference.of_layer(norm.weight, layer), norm.eps), None


def _check(
    name: str,
    x: jax.Array,
    weights: Sequence[jax.Array],
    norm: Norm | None = None,
    biases: Sequence[jax.Array | None] = (),
    residual: jax.Array | None = None,
) -> None:
    """Raise `ValueError` unless everything has the shape that x [B, I] and the weights [L, O, I] ask for."""
    shapes = [(w, (weights[0].shape[0], w.shape[1], x.shape[-1])) for w in weights if w.ndim == 3]
    shapes += [(b, w.shape[:2]) for b, w in zip(biases, weights, strict=bool(biases)) if b is not None]
    shapes += [] if norm is None else [(norm.weight, (weights[0].shape[0], x.shape[-1]))]
    shapes += [] if residual is None else [(residual, (x.shape[0], weights[0].shape[1]))]
    if x.ndim != 2 or any(w.ndim != 3 for w in weights) or any(a.shape != b or a.dtype != x.dtype for a, b in shapes):
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (*weights, *(a for a, _ in shapes[len(weights) :])))
        raise ValueError(f"{name}: {x.dtype}{list(x.shape)} times {given}")
