"""GemFilter (arXiv 2409.17422): early layers choose the tokens, then the whole model reads only those."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import Layer, Scores, Segment
from fastkv_jax.methods.budgets import Budget, at_least, check_int, check_layer
from fastkv_jax.methods.compression import Compression
from kernels_pallas import pool


@dataclass(frozen=True, kw_only=True)
class GemFilter(Compression):
    """One budget for both stages: rows chosen after `filter_layer`, read again from layer 0, and all kept.

    Source: section 3.2, algorithm 1; pooling over 5 as in its code. Differs: the last `window_size` tokens stay, and
    the second pass sees the true positions. The published code, and `reference`, keeps whatever scores best, which may
    drop the last token, and numbers the rows 0, 1, 2, ...
    """

    filter_layer: int | None = None
    published: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.filter_layer is None:
            raise FastKVConfigError("give filter_layer, the layer that chooses the tokens")
        check_int("filter_layer", self.filter_layer, 0)

    def check(self, num_layers: int) -> None:
        """The filter layer must exist."""
        check_layer("filter_layer", self.filter_layer or 0, num_layers, num_layers - 1)

    def window(self, n: np.ndarray) -> np.ndarray:
        """None as published."""
        return np.zeros_like(n) if self.published else super().window(n)

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """A first pass that keeps nothing, and a second one from the bottom."""
        chosen = at_least(1, Budget(self.retention_rate, self.capacity).of(n), n)  # as published: no window
        chosen = np.where(n < self.min_prompt_to_compress, n, chosen) if self.published else self.budget(n)
        first = Segment(0, (self.filter_layer or 0) + 1, n, np.zeros_like(n))
        return first, Segment(0, num_layers, chosen, chosen, renumbered=self.published)

    def scores(self, layer: Layer) -> Scores:
        """q k of the last query, summed over the heads, averaged over 5 neighbours; neither scaled nor softmaxed."""
        batch, kv_heads, rows, dim = layer.k.shape
        last = layer.last_queries(1).reshape(batch, kv_heads, -1, dim).astype(jnp.float32).sum(axis=2)
        products = jnp.einsum("bkd,bksd->bs", last, layer.k.astype(jnp.float32))
        tokens = pool(jnp.where(layer.positions >= 0, products, 0.0), 5, "avg")
        return Scores(tokens, jnp.broadcast_to(tokens[:, None], (batch, kv_heads, rows)))
