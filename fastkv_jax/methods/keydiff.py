"""KeyDiff (arXiv 2504.15364): keep the entries whose keys are unlike the others."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from fastkv_jax.methods.base import Layer
from fastkv_jax.methods.compression import Compression


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Compression):
    """Minus the cosine of each key with the mean direction of all keys. Needs no queries: any question may follow.

    Source: section 3, algorithm 1. Differs: applied once, to the whole prompt instead of block by block, and the last
    `window_size` tokens stay.
    """

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """Keys in float32, padding left out of the mean."""
        k = layer.k.astype(jnp.float32)
        direction = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
        valid = (layer.positions >= 0)[:, None, :, None]
        anchor = jnp.where(valid, direction, 0).sum(axis=2, keepdims=True)
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -(direction * anchor).sum(axis=-1)
