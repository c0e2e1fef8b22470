"""Prefill for methods that choose their TSP layer while the prompt runs: decided on the host, between compiled layers.

Every layer is the same few programs whatever the decision, so no prompt compiles anything new; rows of a batch are
read one after the other, because each may choose another layer.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from fastkv_jax.cache import KVCache, SegmentKV
from fastkv_jax.inputs import Prompt
from fastkv_jax.methods.base import Method
from fastkv_jax.model import Llama
from fastkv_jax.stages import (
    Prefill,
    Progress,
    Static,
    budget,
    call,
    enter,
    enter_budgets,
    leave,
    propagate,
    run_layers,
    shape_of,
    stages_of,
)


@runtime_checkable
class Adaptive(Protocol):
    """A method without TSP in its plan, that says while it runs where the TSP layer is."""

    threshold: float

    def first_layer(self, num_layers: int) -> int:
        """The first layer after which it may be decided; later layers are compared with it."""
        ...

    def at(self, layer: int) -> Method:
        """The method that this one becomes when the layer is found."""
        ...

    def disagreement(self, scores: np.ndarray, best: int) -> float:
        """How much the last layers disagree about the candidates' scores [layers, candidates]."""
        ...


def run_adaptive(
    model: Llama,
    prompt: Prompt,
    past: KVCache | None,
    static: Static,
    call: Callable[..., Any] = call,
    report: Callable[[int], object] | None = None,
    disagreement: Callable[..., float] | None = None,
) -> Prefill:
    """`run_stages` for an `Adaptive` method. `disagreement` None measures it."""
    batch = prompt.tokens.shape[0]
    done = []
    for b in range(batch):
        one = Prompt(*(field[b : b + 1] for field in prompt))
        report_once = report if b == batch - 1 else None
        mine = None if past is None else past.row(b)
        done.append(_one_row(model, one, mine, static, call, report_once, disagreement or _disagreement))
    if batch == 1:
        return done[0]
    return _stack(done)


def _one_row(model: Llama, prompt: Prompt, past, static: Static, call, report, disagreement) -> Prefill:
    method, layers = static.method, model.config.num_layers
    assert isinstance(method, Adaptive)
    before, *rest = stages_of(model, prompt, static._replace(method=method.at(0)))
    after = rest[0] if rest else None  # None: every prompt of this bucket fits
    budgets = call(enter_budgets, model, prompt, static=static)
    at = call(enter, model, prompt, past, static=static)
    kept = call(budget, before.kept, budgets, budgets.n)
    shape, segments, propagated, first_value = shape_of(before), [], None, None
    first = method.first_layer(layers)
    for group in [np.arange(first + 1), *(np.array([i]) for i in range(first + 1, layers))]:
        entries = None if past is None else _past_of(past, group)
        at, new = call(run_layers, model, at, kept, group, entries, stage=shape, static=static)
        segments.append(new)
        if report is not None:
            jax.block_until_ready(at.x)
            report(len(group))
        layer = int(group[-1])
        if after is not None and propagated is None and layer < layers - 1:
            value = disagreement(method, at, layer, after.tokens)
            first_value = value if first_value is None else first_value
            if value < method.threshold * first_value:
                rows_in = call(budget, after.tokens, budgets, budgets.n)
                shape = shape_of(after)
                at = call(propagate, model, prompt, at, rows_in, stage=shape, static=static)
                kept, propagated = call(budget, after.kept, budgets, rows_in), at.rows.positions
    return call(leave, model, at.x, (joined(segments),), past, budgets.n, propagated, static=static)


def _disagreement(method: Adaptive, at: Progress, layer: int, tokens: np.ndarray) -> float:
    """Of the layers run so far; infinite where there is nothing to drop."""
    rows = at.rows
    start, stop, window = (int(np.asarray(a)[0]) for a in (rows.start, rows.stop, rows.window))
    n = rows.positions.shape[1] - start
    if tokens[n] >= n:
        return np.inf
    scores = np.asarray(at.token_scores[-min(layer + 1, len(at.token_scores)) :, 0, start : stop - window])
    return method.disagreement(scores, max(int(tokens[n]) - window, 1))


def _past_of(past: KVCache, layers: np.ndarray) -> SegmentKV:
    """Entries of a group of layers, joined where they lie in several runs."""
    return joined([past.run(int(i), int(i) + 1) for i in layers])


def joined(segments: list[SegmentKV]) -> SegmentKV:
    """Runs of layers as one, empty slots added in front of the shorter ones: decoding compiles once."""
    slots = max(segment.k.shape[3] for segment in segments)

    def widen(a, fill):
        widths = [(0, 0)] * a.ndim
        widths[3] = (slots - a.shape[3], 0)
        return a if a.shape[3] == slots else jnp.pad(a, widths, constant_values=fill)

    parts = [(widen(s.k, 0), widen(s.v, 0), widen(s.positions, -1)) for s in segments]
    return SegmentKV(*(jnp.concatenate(part) for part in zip(*parts, strict=True)), segments[0].sharing)


def _stack(rows: list[Prefill]) -> Prefill:
    """Rows of one batch, each prefilled alone."""
    first = rows[0].cache
    segments = [row.cache.segments[0] for row in rows]
    k, v, positions = (
        jnp.concatenate([getattr(s, name) for s in segments], axis=1) for name in ("k", "v", "positions")
    )
    new = (jnp.concatenate([getattr(row.cache, name) for row in rows], axis=1) for name in ("k_new", "v_new"))
    per_row = (jnp.concatenate([getattr(row.cache, name) for row in rows]) for name in ("filled", "position"))
    cache = KVCache((SegmentKV(k, v, positions, segments[0].sharing),), *new, first.used, *per_row)
    found = [row.propagated for row in rows]
    propagated = None
    if any(p is not None for p in found):
        columns = max(p.shape[1] for p in found if p is not None)
        everything = [_all_positions(row) if p is None else p for row, p in zip(rows, found, strict=True)]
        columns = max([columns, *(p.shape[1] for p in everything)])
        propagated = jnp.concatenate(
            [jnp.pad(p, ((0, 0), (columns - p.shape[1], 0)), constant_values=-1) for p in everything]
        )
    return Prefill(jnp.concatenate([row.logits for row in rows]), cache, propagated)


def _all_positions(row: Prefill):
    return jnp.arange(int(row.cache.position[0]), dtype=jnp.int32)[None]
