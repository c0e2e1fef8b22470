"""Full context: every token goes on, every entry stays."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fastkv_jax.methods.base import Layer, Scores, Segment


@dataclass(frozen=True, kw_only=True)
class FullKV:
    """No compression: the baseline every method is compared with."""

    memory = 1

    def window(self, n: np.ndarray) -> np.ndarray:
        """None is needed: all stays."""
        return np.zeros_like(n)

    def check(self, num_layers: int) -> None:
        """Any model will do."""

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """One run of layers that keeps all."""
        return (Segment(0, num_layers, tokens=n, kept=n),)

    def scores(self, layer: Layer) -> Scores:
        """All rows alike."""
        return Scores(jnp.zeros(layer.positions.shape), jnp.zeros(layer.k.shape[:3]))
