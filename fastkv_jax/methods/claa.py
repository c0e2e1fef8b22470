"""CLAA (arXiv 2602.16054): several layers together choose the tokens that go on."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastkv_jax.methods.base import Segment
from fastkv_jax.methods.budgets import check_int
from fastkv_jax.methods.fastkv import FastKV


@dataclass(frozen=True, kw_only=True)
class CLAA(FastKV):
    """FastKV whose TSP scores are the maximum over `score_layers` layers, and whose first layers keep everything.

    The same share of tokens goes on and of entries stays, unless `tsp_rate` or `tsp_length` says otherwise.

    Source: section 4 (settings of its experiments: TSP layer 15 of 32, 4 layers, 4 full layers, average pooling).
    Differs: entries of layers after the full ones are chosen by their own layer's scores, as in FastKV.
    """

    pooling: Literal["max", "avg"] = "avg"
    score_layers: int = 4
    full_layers: int = 4

    def __post_init__(self):
        if self.tsp_rate is None and self.tsp_length is None:
            rate = 0.1 if self.retention_rate is None and self.capacity is None else self.retention_rate
            object.__setattr__(self, "tsp_rate", rate)
            object.__setattr__(self, "tsp_length", self.capacity)
        super().__post_init__()
        check_int("score_layers", self.score_layers, 1)
        check_int("full_layers", self.full_layers, 0)

    @property
    def memory(self) -> int:
        """The maximum of so many layers decides."""
        return self.score_layers

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """FastKV's plan; layers below `full_layers` keep all that enters them."""
        cut = min(self.full_layers, num_layers)
        runs = []
        for run in super().plan(n, num_layers):
            full = run._replace(stop=min(run.stop, cut), kept=run.tokens)
            rest = run._replace(first=max(run.first, cut))
            runs += [part for part in (full, rest) if part.first < part.stop]
        return tuple(runs)
