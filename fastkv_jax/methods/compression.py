"""What all methods that only compress have in common: every token goes through every layer, a part of K/V stays."""

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import Layer, Scores, Segment
from fastkv_jax.methods.budgets import Budget, at_least, check_int, check_pair, check_pooling

T = TypeVar("T", bound="Compression")


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Each cache head of every layer keeps its best entries. A subclass says which those are.

    `reference(...)` takes the same settings and behaves as the published code.

    Attributes:
        retention_rate: share of the prompt that each head keeps, in (0, 1] (default: 0.1, unless `capacity` is given)
        capacity: entries that each head keeps, >= `window_size`; instead of `retention_rate` (default: None)
        window_size: tokens at the end of the question that always stay, >= 1 (default: 8)
        min_prompt_to_compress: a shorter prompt is left whole, in tokens, >= 0 (default: 0)

    Raises:
        FastKVConfigError: for settings that cannot work
    """

    retention_rate: float | None = None
    capacity: int | None = None
    window_size: int = 8
    min_prompt_to_compress: int = 0

    memory = 1
    scores_need_budget = False  # else `scores` looks at `layer.kept`, and no two budgets share them

    def __post_init__(self):
        self._check_budget()
        check_int("window_size", self.window_size, 1)
        check_int("min_prompt_to_compress", self.min_prompt_to_compress, 0)
        if self.capacity is not None and self.capacity < self.window_size:
            raise FastKVConfigError(f"window_size ({self.window_size}) must not exceed capacity ({self.capacity})")

    def _check_budget(self) -> None:
        if self.retention_rate is None and self.capacity is None:
            object.__setattr__(self, "retention_rate", 0.1)
        check_pair("retention_rate", self.retention_rate, "capacity", self.capacity)

    @classmethod
    def reference(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """As the published code behaves, where that differs from ours."""
        published = {"published": True} if "published" in {field.name for field in fields(cls)} else {}
        return cls(*args, **kwargs, **published)

    def window(self, n: np.ndarray) -> np.ndarray:
        """`window_size`, for every prompt length."""
        return np.full_like(n, self.window_size)

    def check(self, num_layers: int) -> None:
        """Any model will do."""

    def budget(self, n: np.ndarray) -> np.ndarray:
        """Entries that each head keeps of n."""
        kept = at_least(self.window_size, Budget(self.retention_rate, self.capacity).of(n), n)
        return np.where(n < self.min_prompt_to_compress, n, kept)

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """The same budget in all layers."""
        return (Segment(0, num_layers, tokens=n, kept=self.budget(n)),)

    def scores(self, layer: Layer) -> Scores:
        """`importance` for the cache; summed over the heads where tokens are to be chosen by it."""
        kv = self.importance(layer)
        return Scores(kv.sum(axis=1), kv)

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """How much each entry is worth to each cache head, more is better. A subclass says it, or `scores`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WindowCompression(Compression):
    """A compression that looks through the observation window, the last `window_size` queries.

    Attributes:
        kernel_size: neighbours that are pooled into a score, odd, >= 1 (default: 7)
        pooling: "max" or "avg" (default: "max")
    """

    kernel_size: int = 7
    pooling: Literal["max", "avg"] = "max"

    def __post_init__(self):
        super().__post_init__()
        check_pooling(self.kernel_size, self.pooling)


def per_query_head(x: Float[Array, "B K S D"], layer: Layer) -> Float[Array, "B H S D"]:
    """Each KV head repeated for the query heads of its group."""
    return jnp.repeat(x, layer.q.shape[1] // x.shape[1], axis=1)
