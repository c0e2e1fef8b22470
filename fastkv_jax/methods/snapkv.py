"""SnapKV (arXiv 2404.14469): keep what the end of the prompt attends to."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from fastkv_jax.methods.base import Layer
from fastkv_jax.methods.compression import WindowCompression, per_query_head


@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowCompression):
    """Attention of the last `window_size` queries to each entry, summed over them and pooled along the prompt.

    Source: section 4, listing 1. Differs: one cache per KV head, scores summed over its group; the published code,
    and `reference`, caches per query head, which costs G times the memory.
    """

    published: bool = False

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """Per KV head, or per query head as published."""
        k = per_query_head(layer.k, layer) if self.published else layer.k
        queries = layer.last_queries(self.window_size)
        return layer.ops.window_scores(
            queries, k, layer.start, layer.stop, kernel_size=self.kernel_size, pooling=self.pooling
        )
