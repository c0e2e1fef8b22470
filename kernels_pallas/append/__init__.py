"""What a decode step does between its projections and its attention: rotate, and write to the cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.append import reference
from kernels_pallas.dispatch import Implementation, kernels


def append(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    turn: tuple[Float[Array, "B D"], Float[Array, "B D"]],
    buffers: tuple[Float[Array, "L B K M D"], Float[Array, "L B K M D"]],
    used: Int[Array, ""],
    layer: Int[Array, ""],
    *,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> tuple[Float[Array, "B H D"], Float[Array, "L B K M D"], Float[Array, "L B K M D"]]:
    """Queries rotated, and the two buffers with the rotated keys and the values in slot `used` of a layer.

    turn     cosine and sine of each row's angles, each half repeated, float32
    buffers  keys and values of all layers, updated in place where XLA can; behind their last slot nothing is written

    On a GPU one kernel does what XLA makes three of. Raises `ValueError` where the shapes or dtypes do not fit, or the
    buffers have no slot.
    """
    (batch, heads, dim), kv_heads = q.shape, k.shape[1]
    layers, slots = buffers[0].shape[0], buffers[0].shape[3]
    wanted = [(k, (batch, kv_heads, dim)), (v, (batch, kv_heads, dim)), *((a, (batch, dim)) for a in turn)]
    wanted += [(a, (layers, batch, kv_heads, slots, dim)) for a in buffers]
    same = all(a.dtype == q.dtype for a in (k, v, *buffers)) and all(a.dtype == jnp.float32 for a in turn)
    if any(a.shape != shape for a, shape in wanted) or not same or dim % 2 or heads % kv_heads or not slots:
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (q, k, v, *turn, *buffers))
        raise ValueError(f"append: {given}")
    if implementation in ("reference", "tpu"):
        return reference.append(q, k, v, turn, buffers, used, layer)
    return kernels("append", implementation).append(q, k, v, turn, buffers, used, layer, interpret=interpret)
