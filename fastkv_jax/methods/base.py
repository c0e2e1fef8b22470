"""A method is a plan and a score.

The plan says, in Python integers, how many tokens enter each run of layers and how many entries each head keeps, for
every prompt length. The score says, in arrays, which. Nothing else in the package knows a method's name.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastkv_jax.errors import FastKVConfigError


class Segment(NamedTuple):
    """A run of layers [first, stop), and its budgets as functions of the prompt length n (arrays over all n asked)."""

    first: int
    stop: int
    tokens: np.ndarray  # rows that enter the run
    kept: np.ndarray  # entries each cache head of the run keeps


class Rows(NamedTuple):
    """The right-aligned rows that enter a layer.

    column      0   1   2   3   4   5   6   7
    positions  -1  -1   3   4   9  10  11  12      start 2, stop 7: one token of template follows the question
    """

    positions: Int[Array, "B S"]  # where each row stood in the prompt, -1 = padding
    start: Int[Array, " B"]  # first valid column
    stop: Int[Array, " B"]  # the observation window ends before this column


class Scores(NamedTuple):
    """Importance of every row: higher stays; +inf always stays."""

    tokens: Float[Array, "B S"]  # decides what is propagated after this layer
    kv: Float[Array, "B N S"]  # decides what each cache head keeps of this layer


class Method(Protocol):
    """What `prefill` asks of a method: frozen and hashable, since it is a static argument of jit."""

    @property
    def window_size(self) -> int:
        """Tokens at the end of the question that are always kept, 0 for none."""
        ...

    def check(self, num_layers: int) -> None:
        """Raise `FastKVConfigError` if this model has no such layers."""
        ...

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """Budgets for every prompt length in `n`; the segments cover each layer once, in order."""
        ...

    def scores(
        self, q: Float[Array, "B H S D"], k: Float[Array, "B K S D"], v: Float[Array, "B K S D"], rows: Rows
    ) -> Scores:
        """Importance of the rows of one layer, from its rotated queries, its keys and its values."""
        ...


class Stage(NamedTuple):
    """A `Segment` made static for one bucket: shapes as ints, exact budgets as a table over n = 0..T."""

    first: int
    stop: int
    width: int  # S, columns of the rows that enter
    capacity: int  # C, slots each head keeps
    tokens: np.ndarray  # [T + 1] int32
    kept: np.ndarray  # [T + 1] int32
    propagates: bool  # whether some prompt of this bucket loses rows before these layers
    compresses: bool  # whether some prompt of this bucket loses entries in these layers


def static_plan(method: Method, num_layers: int, columns: int, tail: int, tile: int) -> tuple[Stage, ...]:
    """The plan for prompts of up to `columns` tokens whose window ends up to `tail` tokens before their end.

    The window and what follows it always stay, so every budget is at least window + tail, and at most n.
    Capacities are rounded up to `tile`.
    """
    n = np.arange(columns + 1)
    protected = method.window_size + tail if method.window_size else 0

    def static(budget: np.ndarray, limit: int) -> int:
        largest = max(int(budget.max()), min(protected, limit))
        return min(limit, math.ceil(largest / tile) * tile)

    stages: list[Stage] = []
    for segment in check_plan(method.plan(n, num_layers), num_layers):
        tokens, kept = segment.tokens.astype(np.int32), segment.kept.astype(np.int32)
        before = stages[-1] if stages else None
        propagates = bool((tokens < (before.tokens if before else n)).any())
        compresses = bool((kept < tokens).any())
        width = static(tokens, before.width) if before and propagates else before.width if before else columns
        capacity = static(kept, width) if compresses else width
        stages.append(Stage(segment.first, segment.stop, width, capacity, tokens, kept, propagates, compresses))
    return tuple(stages)


def check_plan(segments: Iterable[Segment], num_layers: int) -> tuple[Segment, ...]:
    """Raise `FastKVConfigError` unless the segments cover every layer once, with 0 <= kept <= tokens, never growing."""
    segments = tuple(segments)
    edges = [0] + [segment.stop for segment in segments]
    if edges != [segment.first for segment in segments] + [num_layers]:
        raise FastKVConfigError(f"plan covers layers {edges}, not 0..{num_layers}")
    for i, segment in enumerate(segments):
        before = segments[i - 1].tokens if i else segment.tokens
        if (segment.kept > segment.tokens).any() or (segment.tokens > before).any() or (segment.kept < 0).any():
            raise FastKVConfigError(f"plan of layers {segment.first}..{segment.stop - 1}: budgets exceed the tokens")
    return segments


@dataclass(frozen=True)
class Budget:
    """How many of n: a rate of the prompt or a count, one of them."""

    rate: float | None
    count: int | None

    def of(self, n: np.ndarray) -> np.ndarray:
        """int(n * rate) in double precision, or min(n, count)."""
        if self.rate is not None:
            return np.floor(n * self.rate).astype(np.int64)
        return n if self.count is None else np.minimum(n, self.count)


def check_pair(rate_name: str, rate: float | None, count_name: str, count: int | None) -> None:
    """Raise `FastKVConfigError` unless exactly one of a rate in (0, 1] and a count >= 1 is given."""
    if (rate is None) == (count is None):
        given = "neither is" if rate is None else f"{rate_name}={rate} and {count_name}={count} are both"
        raise FastKVConfigError(f"give one of {rate_name} and {count_name}; {given} set")
    if rate is not None and not 0 < rate <= 1:  # NaN fails too
        raise FastKVConfigError(f"{rate_name} must be in (0, 1], got {rate}")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise FastKVConfigError(f"{count_name} must be an integer >= 1, got {count!r}")


def protect(scores: Float[Array, "*S T"], rows: Rows, window_size: int) -> Float[Array, "*S T"]:
    """+inf for the window and what follows it, -inf for padding. `scores` is [B, ..., T]."""
    columns = jnp.arange(scores.shape[-1])
    shape = (-1,) + (1,) * (scores.ndim - 1)
    scores = jnp.where(columns >= rows.stop.reshape(shape) - window_size, jnp.inf, scores)
    return jnp.where(columns >= rows.start.reshape(shape), scores, -jnp.inf)


def check_window(window_size: int, kernel_size: int, pooling: str) -> None:
    """Raise `FastKVConfigError` unless the window is >= 1, the kernel odd, and the pooling known."""
    if not isinstance(window_size, int) or window_size < 1:
        raise FastKVConfigError(f"window_size must be an integer >= 1, got {window_size!r}")
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise FastKVConfigError(f"kernel_size must be an odd integer >= 1, got {kernel_size!r}")
    if pooling not in ("max", "avg"):
        raise FastKVConfigError(f"pooling must be 'max' or 'avg', got {pooling!r}")


def at_least(window: int, budget: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The budget, but never less than the window and never more than n."""
    return np.minimum(n, np.maximum(window, budget))


def observation_window(q: Float[Array, "B H S D"], rows: Rows, window_size: int) -> Float[Array, "B H W D"]:
    """The queries of the last `window_size` columns before `rows.stop`."""
    columns = jnp.maximum(rows.stop[:, None] - window_size + jnp.arange(window_size), 0)
    return jnp.take_along_axis(q, columns[:, None, :, None], axis=2)


class Kept(NamedTuple):
    """What one prompt really gets in a run of layers, for people to read."""

    first: int
    last: int
    tokens: int
    kept: int


def effective_budgets(method: Method, n: int, window_end: int, num_layers: int) -> list[Kept]:
    """The exact budgets of a prompt of n tokens whose window ends `window_end` tokens before its end."""
    protected = method.window_size + window_end if method.window_size else 0
    runs, tokens = [], n
    for segment in check_plan(method.plan(np.array([n]), num_layers), num_layers):
        tokens = n if segment.tokens[0] == n else min(tokens, max(int(segment.tokens[0]), protected))
        kept = min(tokens, max(int(segment.kept[0]), protected))
        if segment.first < segment.stop:
            runs.append(Kept(segment.first, segment.stop - 1, tokens, kept))
    return runs
