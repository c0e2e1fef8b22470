"""TOVA (arXiv 2401.06104): keep what the last token attends to."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from fastkv_jax.methods.base import Layer
from fastkv_jax.methods.compression import Compression


@dataclass(frozen=True, kw_only=True)
class TOVA(Compression):
    """Attention of the question's last token, averaged over all heads: one set of entries for a whole layer.

    Source: section 3.2. Differs: applied once, to the prompt, and the last `window_size` tokens stay.
    """

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """The same row of scores for every head."""
        last = layer.ops.window_scores(
            layer.last_queries(1), layer.k, layer.start, layer.stop, kernel_size=1, pooling="max"
        )
        return jnp.broadcast_to(last.mean(axis=1, keepdims=True), last.shape)
