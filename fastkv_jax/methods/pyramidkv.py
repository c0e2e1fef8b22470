"""PyramidKV (arXiv 2406.02069): more entries in the lower layers, fewer in the upper ones."""

from dataclasses import dataclass

import numpy as np

from fastkv_jax.methods.base import Segment
from fastkv_jax.methods.budgets import check_int
from fastkv_jax.methods.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's scores; budgets that fall linearly with depth and have SnapKV's mean.

    Beside the window the last layer keeps (budget - window) / beta; the first what makes the mean right, at most all.
    Source: section 4.2, equations 5 to 7. Differs: one cache per KV head, as our SnapKV.
    """

    beta: int = 20

    def __post_init__(self):
        super().__post_init__()
        check_int("beta", self.beta, 1)

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """A budget for each layer; the sum is that of the even one, rounded down in each layer."""
        even = self.budget(n)
        base, window = even - np.minimum(n, self.window_size), np.minimum(n, self.window_size)
        most = np.minimum(2 * base - base // self.beta, n - window)
        least = 2 * base - most
        depth = np.arange(num_layers)[:, None] / max(num_layers - 1, 1)
        kept = window + np.floor(most - (most - least) * depth).astype(np.int64)
        return tuple(Segment(i, i + 1, n, kept[i]) for i in range(num_layers))
