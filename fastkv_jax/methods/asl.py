"""ASL (arXiv 2601.07667): the TSP layer is found while the prompt runs."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from fastkv_jax.methods.base import Layer, Scores
from fastkv_jax.methods.budgets import check_int, check_layer, check_pair, check_rate
from fastkv_jax.methods.compression import WindowCompression
from fastkv_jax.methods.fastkv import FastKV


@dataclass(frozen=True, kw_only=True)
class ASL(WindowCompression):
    """FastKV that propagates after the first layer whose ranking of the tokens agrees with the layers before it.

    Agreement: the variance of ranks over the last `score_layers` layers, for all tokens that are best in one of them,
    divided by its value at `min_layer` (None: a third of the model), is below `threshold`. If that never happens,
    nothing is dropped. The budget of the cache is that of the tokens unless given.

    Source: section 3 and its code (window 32, average pooling, 2,048 tokens). Decided for each prompt on the host.
    """

    window_size: int = 32
    pooling: Literal["max", "avg"] = "avg"
    tsp_rate: float | None = None
    tsp_length: int | None = None
    min_layer: int | None = None
    score_layers: int = 8
    threshold: float = 0.3

    def __post_init__(self):
        if self.tsp_rate is None and self.tsp_length is None:
            object.__setattr__(self, "tsp_length", 2048)
        check_pair("tsp_rate", self.tsp_rate, "tsp_length", self.tsp_length)
        if self.retention_rate is None and self.capacity is None:
            object.__setattr__(self, "retention_rate", self.tsp_rate)
            object.__setattr__(self, "capacity", self.tsp_length)
        super().__post_init__()
        check_int("score_layers", self.score_layers, 2)
        check_int("min_layer", 0 if self.min_layer is None else self.min_layer, 0)
        check_rate("threshold", self.threshold)
        self.at(0)

    @property
    def memory(self) -> int:
        """The ranks of so many layers are compared."""
        return self.score_layers

    def check(self, num_layers: int) -> None:
        """There must be a layer to decide after, and one to propagate to."""
        check_layer("min_layer", self.first_layer(num_layers), num_layers, num_layers - 2)

    def first_layer(self, num_layers: int) -> int:
        """Where the variance is first measured."""
        return num_layers // 3 if self.min_layer is None else self.min_layer

    def at(self, layer: int) -> FastKV:
        """What follows once the layer is found."""
        shared = {field.name: getattr(self, field.name) for field in fields(WindowCompression)}
        return FastKV(tsp_layer=layer, tsp_rate=self.tsp_rate, tsp_length=self.tsp_length, **shared)

    def scores(self, layer: Layer) -> Scores:
        """FastKV's."""
        return self.at(0).scores(layer)

    def disagreement(self, scores: np.ndarray, best: int) -> float:
        """Variance of the ranks of the tokens that are among the `best` of a layer; `scores` [layers, candidates]."""
        order = np.argsort(-scores, axis=-1, kind="stable")
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(1, scores.shape[1] + 1)[None], axis=-1)
        union = np.unique(order[:, :best])
        return float(np.var(ranks[:, union], axis=0).mean()) if union.size else 0.0
