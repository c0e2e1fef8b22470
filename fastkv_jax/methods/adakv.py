"""AdaKV (arXiv 2407.11550): the heads of a layer share one budget."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastkv_jax.methods.base import Layer, Method, Segment
from fastkv_jax.methods.compression import WindowCompression
from fastkv_jax.methods.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(WindowCompression):
    """The best of all heads' entries together, after each head's best fifth of an even share, which is safe.

    A flat cache per layer holds them, so that heads of different sizes cost no padding. `base` gives the scores, SnapKV
    if None; its own budget is not used.

    Source: algorithms 1 and 2; the safe fifth as in kvpress 0.5.4.
    """

    base: Method | None = None
    scores_need_budget = True

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """An even share for each head, put together."""
        return tuple(segment._replace(shared=True) for segment in super().plan(n, num_layers))

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """The base's scores, +inf for what is safe."""
        base = self.base or SnapKV(window_size=self.window_size, kernel_size=self.kernel_size, pooling=self.pooling)
        scores = layer.protect(base.scores(layer).kv)
        safe = layer.ops.among_best(scores, jnp.broadcast_to((layer.kept // 5)[:, None], scores.shape[:2]))
        return jnp.where(safe, jnp.inf, scores)
