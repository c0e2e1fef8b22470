"""A method's plan made static for one bucket of prompt lengths, checked, and put into words for people."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import Method, Segment


class Stage(NamedTuple):
    """One or more `Segment`s of the same shapes: shapes as ints, exact budgets as tables over n = 0..T."""

    first: int
    stop: int
    width: int  # S, columns of the rows that enter
    capacity: int  # C, slots each head keeps (flat: all heads together); 0 = nothing is kept
    tokens: np.ndarray  # [T + 1] int32
    kept: np.ndarray  # [stop - first, T + 1] int32, for each layer; [1, T + 1] if all are the same
    propagates: bool  # whether some prompt of this bucket loses rows before these layers
    compresses: bool  # whether some prompt of this bucket loses entries in these layers
    restarts: bool  # the prompt is read anew, from layer 0
    shared: bool
    renumbered: bool

    @property
    def _shape(self) -> tuple[int, int, bool, bool, bool]:
        return self.width, self.capacity, self.compresses, self.shared, self.renumbered


def static_plan(method: Method, num_layers: int, kv_heads: int, columns: int, tail: int, tile: int) -> list[Stage]:
    """The plan for prompts of up to `columns` tokens whose window ends up to `tail` tokens before their end.

    The window and what follows it always stay, so every budget is at least window + tail, and at most n.
    Capacities are rounded up to `tile`. Neighbouring segments of the same shapes become one stage.
    """
    n = np.arange(columns + 1)
    window = method.window(n)
    protected = np.where(window > 0, window + tail, 0)

    def slots(budget: np.ndarray, limit: int) -> int:
        largest = int(np.maximum(budget, np.minimum(n, protected)).max())
        return min(limit, math.ceil(largest / tile) * tile)

    stages: list[Stage] = []
    width, before = columns, n
    for i, segment in enumerate(check_plan(method.plan(n, num_layers), num_layers)):
        tokens, kept = segment.tokens.astype(np.int32), segment.kept.astype(np.int32)
        restarts = i > 0 and segment.first == 0
        propagates = restarts or bool((tokens < before).any())
        width, before = slots(tokens, width) if propagates else width, tokens
        compresses = bool((kept < tokens).any())
        heads = kv_heads if segment.shared else 1
        capacity = slots(kept, width) * heads if compresses else width * heads
        if not kept.any():
            capacity = 0
        rest = (tokens, kept[None], propagates, compresses, restarts, segment.shared, segment.renumbered)
        stage = Stage(segment.first, segment.stop, width, capacity, *rest)
        if stages and not propagates and stages[-1]._shape == stage._shape:
            last = stages.pop()
            tables = [np.repeat(one.kept, (one.stop - one.first) // len(one.kept), axis=0) for one in (last, stage)]
            same = np.array_equal(last.kept, stage.kept)
            stage = last._replace(stop=stage.stop, kept=last.kept if same else np.concatenate(tables))
        stages.append(stage)
    return stages


def check_plan(segments: Iterable[Segment], num_layers: int) -> tuple[Segment, ...]:
    """Raise `FastKVConfigError` unless the segments cover every layer once, with 0 <= kept <= tokens, never growing."""
    segments = tuple(segments)
    start = max((i for i, segment in enumerate(segments) if segment.first == 0), default=0)
    for run, end in ((segments[:start], segments[start - 1].stop if start else 0), (segments[start:], num_layers)):
        edges = [0] + [segment.stop for segment in run]
        if edges != [segment.first for segment in run] + [end]:
            raise FastKVConfigError(f"plan covers layers {edges}, not 0..{num_layers}")
    for i, segment in enumerate(segments):
        before = segments[i - 1].tokens if i else segment.tokens
        if (segment.kept > segment.tokens).any() or (segment.tokens > before).any() or (segment.kept < 0).any():
            raise FastKVConfigError(f"plan of layers {segment.first}..{segment.stop - 1}: budgets exceed the tokens")
    return segments


def layers_run(method: Method, num_layers: int) -> int:
    """Layers that a prompt goes through, those of a pass that starts again included."""
    return sum(segment.stop - segment.first for segment in method.plan(np.array([1]), num_layers))


class Kept(NamedTuple):
    """What one prompt really gets in a run of layers, for people to read."""

    first: int
    last: int
    tokens: int
    kept: int


def effective_budgets(method: Method, n: int, window_end: int, num_layers: int) -> list[Kept]:
    """The exact budgets of a prompt of n tokens whose window ends `window_end` tokens before its end."""
    window = int(method.window(np.array([n]))[0])
    protected = window + window_end if window else 0
    runs: list[Kept] = []
    tokens = n
    for segment in check_plan(method.plan(np.array([n]), num_layers), num_layers):
        tokens = n if segment.tokens[0] == n else min(tokens, max(int(segment.tokens[0]), protected))
        kept = min(tokens, max(int(segment.kept[0]), protected)) if segment.kept[0] else 0
        runs = runs if segment.first else []  # a pass that starts again drops the one before
        if runs and (runs[-1].tokens, runs[-1].kept) == (tokens, kept):
            runs[-1] = runs[-1]._replace(last=segment.stop - 1)
        elif segment.first < segment.stop:
            runs.append(Kept(segment.first, segment.stop - 1, tokens, kept))
    return runs
