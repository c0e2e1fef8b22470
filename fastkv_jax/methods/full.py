"""Full context: every token goes on, every entry stays."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fastkv_jax.methods.base import Rows, Scores, Segment


@dataclass(frozen=True)
class FullKV:
    """No compression: the baseline every method is compared with."""

    window_size = 0

    def check(self, num_layers: int) -> None:
        """Any model will do."""

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """One run of layers that keeps all."""
        return (Segment(0, num_layers, tokens=n, kept=n),)

    def scores(self, q, k, v, rows: Rows) -> Scores:
        """All rows alike."""
        return Scores(jnp.zeros(rows.positions.shape), jnp.zeros(k.shape[:3]))
