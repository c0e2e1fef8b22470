"""FastKV (arXiv 2502.01068v7): token-selective propagation for prefill, per-head KV compression for decode."""

from dataclasses import dataclass

import numpy as np

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import Layer, Method, Scores, Segment
from fastkv_jax.methods.budgets import at_least, check_layer
from fastkv_jax.methods.compression import WindowCompression
from fastkv_jax.methods.tsp import Boundary, Counts, Rates, boundaries, check_parts, check_rows, compose


@dataclass(frozen=True, kw_only=True)
class FastKV(WindowCompression):
    """The prompt runs in full through layers 0..tsp_layer; later layers see its most attended tokens only (TSP).

    Independently, each KV head of every layer keeps its most attended entries. Both are judged by the attention of the
    last `window_size` queries, pooled over `kernel_size` neighbours, and the window itself always stays.

    `FastKV.reference(...)` behaves as the published code wherever that runs: a prompt below the KV budget skips TSP
    too, and any layer may be the TSP layer.

    Attributes:
        tsp_layer: after which rows are dropped, from 0 to the number of layers - 2; it or `tsp_layers` must be given
        tsp_rate: share of the prompt that goes on, in (0, 1] (default: 0.2, unless `tsp_length` is given)
        tsp_length: tokens that go on, >= `window_size`; instead of `tsp_rate` (default: None)
        tsp_layers: several of them, rising; `tsp_rate` is then one number for each, or what is left after the last
            (default: None)
        compression: another method that keeps entries, with its own budget (default: None, FastKV's own)
        selection: another method that chooses tokens (default: None, FastKV's own)
        published: what `reference` sets (default: False)
    """

    tsp_layer: int | None = None
    tsp_rate: Rates = None
    tsp_length: Counts = None
    tsp_layers: tuple[int, ...] | None = None
    compression: Method | None = None
    selection: Method | None = None
    published: bool = False

    def __post_init__(self):
        if self.tsp_rate is None and self.tsp_length is None:
            object.__setattr__(self, "tsp_rate", 0.2)
        super().__post_init__()
        check_rows(self.boundaries, self.window_size, self.retention_rate, self.capacity, self.published)

    def _check_budget(self) -> None:
        if self.compression is None:
            super()._check_budget()
        elif (self.retention_rate, self.capacity) != (None, None):
            raise FastKVConfigError("compression brings its own budget; give no retention_rate or capacity beside it")

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Where rows are dropped, and how many go on."""
        return boundaries(self.tsp_layer, self.tsp_layers, self.tsp_rate, self.tsp_length)

    @property
    def memory(self) -> int:
        """As the selection asks."""
        return self.selection.memory if self.selection else 1

    def window(self, n: np.ndarray) -> np.ndarray:
        """The longest of all parts'."""
        parts = [part.window(n) for part in (self.compression, self.selection) if part]
        return np.maximum.reduce([super().window(n), *parts])

    def check(self, num_layers: int) -> None:
        """The TSP layers must exist, and something must come after them."""
        for layer, _ in self.boundaries:
            check_layer("tsp_layer", layer, num_layers, num_layers - (1 if self.published else 2))
        check_parts(self.compression, self.selection, num_layers)

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """Section 4, algorithm 1: runs of layers with fewer and fewer rows, the budgets of the cache decoupled."""
        whole = n < max(self.min_prompt_to_compress, (self.published and self.capacity) or 0)
        window, inner = self.window(n), self.compression.plan(n, num_layers) if self.compression else None
        edges, rows, kept = [0], [n], [n if inner else np.where(whole, n, self.budget(n))]
        for layer, budget in self.boundaries:
            edges.append(layer + 1)
            rows.append(np.where(whole, n, at_least(window, budget.of(n), rows[-1])))
            kept.append(kept[-1])
            if budget.rate is not None and self.retention_rate is not None:  # truncated twice, as published
                kept[-1] = np.where(whole, n, np.floor(rows[-1] * (self.retention_rate / budget.rate)).astype(np.int64))
        runs = []
        for first, stop, tokens, entries in zip(edges, [*edges[1:], num_layers], rows, kept, strict=True):
            runs += compose(first, stop, tokens, inner or [Segment(0, num_layers, n, entries)], window)
        return tuple(runs)

    def scores(self, layer: Layer) -> Scores:
        """Equations 1 and 2: per KV head for the cache, summed over the heads for propagation."""
        kv = layer.ops.window_scores(
            layer.last_queries(self.window_size), layer.k, layer.start, layer.stop,
            kernel_size=self.kernel_size, pooling=self.pooling,
        )  # fmt: skip
        tokens = self.selection.scores(layer).tokens if self.selection else kv.sum(axis=1)
        return Scores(tokens, self.compression.scores(layer).kv if self.compression else kv)
