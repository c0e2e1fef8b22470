"""FastKV (arXiv 2502.01068v7): token-selective propagation for prefill, per-head KV compression for decode."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import (
    Budget,
    Rows,
    Scores,
    Segment,
    at_least,
    check_pair,
    check_window,
    observation_window,
    protect,
)
from kernels_pallas import window_scores


@dataclass(frozen=True)
class FastKV:
    """The prompt runs in full through layers 0..tsp_layer; later layers see its most attended tokens only (TSP).

    Independently, each KV head of every layer keeps its most attended entries. Both are judged by the attention of the
    last `window_size` queries, pooled over `kernel_size` neighbours, and the window itself always stays.

    Units: `tsp_rate` and `retention_rate` are shares of the prompt in (0, 1], `tsp_length` and `capacity` tokens; one
    of each pair. A prompt shorter than `min_prompt_to_compress` tokens is left whole. `tsp_layer` counts from 0.

    Raises `FastKVConfigError` for settings that cannot work. `FastKV.reference(...)` takes the same settings and
    behaves as the published code wherever that runs.
    """

    tsp_layer: int
    tsp_rate: float | None = None
    retention_rate: float | None = None
    tsp_length: int | None = None
    capacity: int | None = None
    window_size: int = 8
    kernel_size: int = 7
    pooling: Literal["max", "avg"] = "max"
    min_prompt_to_compress: int = 0
    published: bool = False

    def __post_init__(self):
        if self.tsp_rate is None and self.tsp_length is None:
            object.__setattr__(self, "tsp_rate", 0.2)
        if self.retention_rate is None and self.capacity is None:
            object.__setattr__(self, "retention_rate", 0.1)
        check_pair("tsp_rate", self.tsp_rate, "tsp_length", self.tsp_length)
        check_pair("retention_rate", self.retention_rate, "capacity", self.capacity)
        check_window(self.window_size, self.kernel_size, self.pooling)
        if not isinstance(self.tsp_layer, int) or isinstance(self.tsp_layer, bool) or self.tsp_layer < 0:
            raise FastKVConfigError(f"tsp_layer must be an integer >= 0, got {self.tsp_layer!r}")
        if self.min_prompt_to_compress < 0:
            raise FastKVConfigError(f"min_prompt_to_compress must be >= 0, got {self.min_prompt_to_compress}")
        for name in ("tsp_length", "capacity"):
            count = getattr(self, name)
            if count is not None and count < self.window_size:
                raise FastKVConfigError(f"window_size ({self.window_size}) must not exceed {name} ({count})")
        self._check_budgets_fit()

    def _check_budgets_fit(self) -> None:
        if self.published:
            return
        if self.tsp_length is not None and self.capacity is not None and self.tsp_length < self.capacity:
            raise FastKVConfigError(
                f"tsp_length ({self.tsp_length}) < capacity ({self.capacity}): later layers cannot hold the budget"
            )
        if self.tsp_rate is not None and self.retention_rate is not None and self.retention_rate > self.tsp_rate:
            warnings.warn(
                f"retention_rate ({self.retention_rate}) > tsp_rate ({self.tsp_rate}): "
                f"layers after {self.tsp_layer} keep {self.tsp_rate} of the prompt",
                stacklevel=4,
            )

    @classmethod
    def reference(cls, *args: Any, **kwargs: Any) -> "FastKV":
        """The published code's rules: a prompt below the KV budget skips TSP too, any layer may be the TSP layer."""
        return cls(*args, **kwargs, published=True)

    def check(self, num_layers: int) -> None:
        """The TSP layer must exist, and something must come after it."""
        last = num_layers - 1 if self.published else num_layers - 2
        if last < 0:
            raise FastKVConfigError(f"a {num_layers}-layer model has no layer to propagate to; use FullKV (full)")
        if self.tsp_layer > last:
            raise FastKVConfigError(f"tsp_layer {self.tsp_layer} is outside 0…{last} for a {num_layers}-layer model")

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """Section 4, algorithm 1: two runs of layers, their budgets decoupled."""
        window = self.window_size
        tokens = at_least(window, Budget(self.tsp_rate, self.tsp_length).of(n), n)
        kept = at_least(window, Budget(self.retention_rate, self.capacity).of(n), n)
        if self.tsp_rate is not None and self.retention_rate is not None:
            later = np.floor(tokens * (self.retention_rate / self.tsp_rate)).astype(np.int64)
        else:
            later = Budget(self.retention_rate, self.capacity).of(n)
        whole = n < self.min_prompt_to_compress
        if self.published and self.capacity is not None:  # TSP sits inside the branch that compresses
            whole = whole | (n < self.capacity)
        tokens, kept = np.where(whole, n, tokens), np.where(whole, n, kept)
        later = np.where(whole, n, at_least(window, later, tokens))
        tsp = self.tsp_layer + 1
        return (Segment(0, tsp, n, kept), Segment(tsp, num_layers, tokens, later))

    def scores(self, q, k, v, rows: Rows) -> Scores:
        """Equations 1 and 2: per KV head for the cache, summed over the heads for propagation."""
        queries = observation_window(q, rows, self.window_size)
        kv = window_scores(queries, k, rows.start, rows.stop, kernel_size=self.kernel_size, pooling=self.pooling)
        return Scores(protect(kv.sum(axis=1), rows, self.window_size), protect(kv, rows, self.window_size))
