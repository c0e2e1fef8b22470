"""Choosing rows and gathering them: exact top-k by score, positions carried along."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastkv_jax.model.ops import PLAIN, Ops


class Chosen(NamedTuple):
    """Right-aligned columns chosen from a longer row, -1 in the empty slots before them."""

    columns: Int[Array, "*S C"]

    def take(self, x: Array, fill: int) -> Array:
        """The chosen entries of x [*S, T, ...], `fill` in the empty slots."""
        extra = (1,) * (x.ndim - self.columns.ndim)
        index = self.columns.reshape(*self.columns.shape, *extra)
        taken = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=self.columns.ndim - 1)
        return jnp.where(index >= 0, taken, jnp.asarray(fill, x.dtype))


def choose(scores: Float[Array, "*S T"], count: Int[Array, "*#S"], capacity: int, ops: Ops = PLAIN) -> Chosen:
    """The `count` best columns of each row, in their order; ties go to the lowest index."""
    return Chosen(ops.select(scores, jnp.broadcast_to(count, scores.shape[:-1]), capacity))
