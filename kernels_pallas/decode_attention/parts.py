"""Decode attention in parts: each over its own slots, merged by their log-sum-exp (flash-decoding).

The kernels of every platform share this: one kernel attends to a stretch of slots, and runs once over the frozen prompt
and once over the append buffer, whose heads may be others (N and K).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Slots(NamedTuple):
    """Keys and values of N heads, of one layer or of L; None for what is not there.

    Arrays, or within a kernel what Pallas has in their place.
    """

    k: Any  # [*L, B, N, C, D]
    v: Any  # [*L, B, N, C, D]
    positions: Any = None  # [*L, B, N, C] int32, -1 in an empty slot; None: all slots hold something
    heads: Any = None  # [*L, B, 1, C] int32, the KV head a slot of a flat cache belongs to
    k_scale: Any = None  # [*L, B, N, C] bfloat16
    v_scale: Any = None  # [*L, B, N, C] bfloat16


def mixed_in(queries: jnp.dtype, slots: Slots) -> jnp.dtype:
    """What weights and values are multiplied in: as the queries, but that weights times 8-bit scales would vanish in
    float16, below 6e-8; bfloat16 holds them, and 8-bit values exactly."""
    return jnp.dtype(jnp.bfloat16) if slots.v_scale is not None and queries == jnp.float16 else jnp.dtype(queries)


# attend(q [B, H, D], slots, layer [], used [B], group) -> out [B, H, P, D] float32, log_sum_exp [B, H, P] float32, of P
# parts: attention over the layer's first `used` slots; log_sum_exp is -inf and out 0 where a query sees none of them.
Attend = Callable[[jax.Array, Slots, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


def attend_to_both(attend: Attend, q, prompt: Slots, new: Slots, filled, layer) -> Float[Array, "B H D"]:
    """`layer`: which one of the prompt's, and of the new entries."""
    group = q.shape[1] // new.k.shape[2]
    parts = [attend(q, new, layer[1], filled, group)]
    capacity = prompt.k.shape[3]
    if capacity:
        parts.append(attend(q, prompt, layer[0], jnp.full_like(filled, capacity), group))
    outs, sums = zip(*parts, strict=True)
    return merge(jnp.concatenate(outs, axis=2), jnp.concatenate(sums, axis=2)).astype(q.dtype)


def merge(out: Float[Array, "B H P D"], log_sum_exp: Float[Array, "B H P"]) -> Float[Array, "B H D"]:
    """Each part counts by the sum of its exponentials; at least one is not empty."""
    weights = jax.nn.softmax(log_sum_exp, axis=-1)
    return (out * weights[..., None]).sum(axis=2)
