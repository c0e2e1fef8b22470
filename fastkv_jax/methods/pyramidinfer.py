"""PyramidInfer (arXiv 2405.12532): fewer tokens in every layer, the cache shrinking with them."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.attention_sums import attention_sums
from fastkv_jax.methods.base import Layer, Scores, Segment
from fastkv_jax.methods.budgets import check_int, check_rate


@dataclass(frozen=True, kw_only=True)
class PyramidInfer:
    """After every layer but the first, the tokens before the recent ones are cut by a share that falls with depth.

    The share falls from 1 to `decay_ratio` along half a cosine. The last `recent_ratio` of the prompt judges, later
    queries up to `distance_weight` times as much as earlier ones, and always stays, as do the first `sinks`. A cut to
    `min_context` tokens or fewer is not made.

    Source: section 3.3 and its code as FastKV compared with it, prefill only. `reference` is the same.
    """

    recent_ratio: float = 0.2
    decay_ratio: float = 0.7
    distance_weight: float = 1.2
    sinks: int = 4
    min_context: int = 64

    memory = 1

    def __post_init__(self):
        check_rate("recent_ratio", self.recent_ratio)
        check_rate("decay_ratio", self.decay_ratio)
        if not 0 < self.distance_weight < math.inf:  # NaN fails too
            raise FastKVConfigError(f"distance_weight must be > 0, got {self.distance_weight}")
        check_int("sinks", self.sinks, 0)
        check_int("min_context", self.min_context, 0)

    @classmethod
    def reference(cls, **kwargs) -> "PyramidInfer":
        """The published code behaves in the same way."""
        return cls(**kwargs)

    def window(self, n: np.ndarray) -> np.ndarray:
        """The recent tokens and the last one."""
        return np.minimum(n, 1 + np.floor(n * self.recent_ratio).astype(np.int64))

    def check(self, num_layers: int) -> None:
        """Any model will do."""

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """One run for each layer; what enters it is kept."""
        recent, rows, segments = self.window(n), n, []
        for i in range(num_layers):
            segments.append(Segment(i, i + 1, rows, rows))
            share = (1 - self.decay_ratio) * (math.cos(math.pi * i / num_layers) + 1) / 2 + self.decay_ratio
            context = np.floor((rows - recent) * share).astype(np.int64)
            cut = (context > np.minimum(self.min_context, n - recent)) & (i > 0)
            rows = np.where(cut, recent + context, rows)
        return tuple(segments)

    def scores(self, layer: Layer) -> Scores:
        """Attention of the recent queries, weighted by how recent they are, averaged over them and the heads."""
        columns = jnp.arange(layer.positions.shape[1])[None]
        rank = columns - (layer.stop - layer.window)[:, None]  # 0 for the oldest of the recent
        age = rank / jnp.maximum(layer.window - 1, 1)[:, None]  # 0 ... 1, the newest
        weight = (1 + (self.distance_weight - 1) * age) / layer.window[:, None].astype(jnp.float32)
        judging = (rank >= 0) & (rank < layer.window[:, None])
        attention = attention_sums(layer, jnp.where(judging, weight, 0.0)).mean(axis=1)
        sink = (layer.positions >= 0) & (layer.positions < self.sinks)
        tokens = jnp.where(sink, jnp.inf, attention)
        return Scores(tokens, jnp.broadcast_to(tokens[:, None], layer.k.shape[:3]))
