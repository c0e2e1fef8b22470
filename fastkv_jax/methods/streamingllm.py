"""StreamingLLM (arXiv 2309.17453): the first tokens, which all attention sinks into, and the last."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import Layer
from fastkv_jax.methods.budgets import check_int
from fastkv_jax.methods.compression import Compression


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Compression):
    """`sinks` first tokens and the last budget - sinks. No score, the same entries in every head.

    Source: section 3.2. Differs from the paper, as the code FastKV was compared with: keys keep their rotation.
    """

    window_size: int = 1
    sinks: int = 4

    def __post_init__(self):
        super().__post_init__()
        check_int("sinks", self.sinks, 0)
        if self.capacity is not None and self.capacity < self.sinks + self.window_size:
            raise FastKVConfigError(f"capacity ({self.capacity}) must exceed sinks ({self.sinks})")

    def budget(self, n):
        """Never less than the sinks and one recent token."""
        return np.maximum(super().budget(n), np.minimum(n, self.sinks + self.window_size))

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """Later is better, and the sinks are best."""
        sink = (layer.positions >= 0) & (layer.positions < self.sinks)
        recency = jnp.where(sink, jnp.inf, layer.positions.astype(jnp.float32))
        return jnp.broadcast_to(recency[:, None], layer.k.shape[:3])
