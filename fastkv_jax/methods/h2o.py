"""H2O, heavy-hitter oracle (arXiv 2306.14048): keep what the whole prompt attends to."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from fastkv_jax.methods.attention_sums import attention_sums
from fastkv_jax.methods.base import Layer
from fastkv_jax.methods.compression import Compression


@dataclass(frozen=True, kw_only=True)
class H2O(Compression):
    """Attention of all queries to each entry, summed; the last `window_size` tokens stay.

    Source: section 4.1, with the whole prompt scored at once. Differs: one cache per KV head, summed over its group.
    The published code, and `reference`, caches per query head, and its queries see the keys after them, except
    inside the last window.
    """

    published: bool = False

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """Column sums of the attention map."""
        columns = jnp.arange(layer.q.shape[2])[None]
        everyone = (columns >= layer.start[:, None]).astype(jnp.float32)
        if not self.published:
            sums = attention_sums(layer, everyone)
            return sums.reshape(sums.shape[0], layer.k.shape[1], -1, sums.shape[-1]).sum(axis=2)
        window = (layer.stop - self.window_size)[:, None, None]
        return attention_sums(layer, everyone, lambda query, key: (query >= key) | (query < window) | (key < window))
