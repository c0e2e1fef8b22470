"""Knorm (arXiv 2406.11430): keep the entries whose keys are short."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastkv_jax.methods.base import Layer
from fastkv_jax.methods.compression import Compression


@dataclass(frozen=True, kw_only=True)
class Knorm(Compression):
    """Minus the L2 norm of the key. Needs no queries, so any question may follow.

    Source: section 3. Differs: the last `window_size` tokens stay.
    """

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """Short keys are those that much attention falls on."""
        norm = jnp.linalg.norm(layer.k.astype(jnp.float32), axis=-1)
        # In layer 0 equal tokens have equal norms, whatever their rotation: without its noise they tie, the first wins.
        return -lax.reduce_precision(norm, exponent_bits=8, mantissa_bits=14)
