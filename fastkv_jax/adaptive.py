"""Prefill for methods that choose their TSP layer while the prompt runs: decided on the host, between compiled layers.

Every layer is the same few programs whatever the decision, so no prompt compiles anything new; rows of a batch are
read one after the other, because each may choose another layer.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
        tokens, start = (lax.dynamic_slice_in_dim(a, b, 1) for a in (prompt.tokens, prompt.start))
        one = Prompt(tokens, start, prompt.window_end[b : b + 1])
        report_once = report if b == batch - 1 else None
        mine = None if past is None else past.row(b)
        done.append(_one_row(model, one, mine, static, call, report_once, disagreement or _disagreement))
    if batch == 1:
        return done[0]
    return call(_stack, done)


def _one_row(model: Llama, prompt: Prompt, past, static: Static, call, report, disagreement) -> Prefill:
    method, layers = static.method, model.config.num_layers
    assert isinstance(method, Adaptive)
    before, *rest = stages_of(model, prompt, static._replace(method=method.at(0)))
    after = rest[0] if rest else None  # None: every prompt of this bucket fits
    budgets = call(enter_budgets, model, prompt, static=static)
    at = call(enter, model, prompt, past, static=static)
    kept = call(budget, before.kept, budgets, budgets.n)
    shape, segments, chosen, first_value = shape_of(before), [], False, None
    first = method.first_layer(layers)
    for group in [np.arange(first + 1), *(np.array([i]) for i in range(first + 1, layers))]:
        entries = None if past is None else _past_of(past, group)
        mine = kept if len(kept) == 1 else kept[group]
        at, new = call(run_layers, model, at, mine, group, entries, stage=shape, static=static)
        segments.append(new)
        if report is not None:
            jax.block_until_ready(at.x)
            report(len(group))
        layer = int(group[-1])
        if after is not None and not chosen and layer < layers - 1:
            value = disagreement(method, at, layer, after.tokens)
            first_value = value if first_value is None else first_value
            if value < method.threshold * first_value:
                rows_in = call(budget, after.tokens, budgets, budgets.n)
                shape = shape_of(after)
                at = call(propagate, model, prompt, at, rows_in, stage=shape, static=static)
                kept, chosen = call(budget, after.kept, budgets, rows_in), True
    propagated = at.rows.positions  # all of them if no layer was chosen, in as many columns
    propagated = jnp.pad(propagated, ((0, 0), (before.width - propagated.shape[1], 0)), constant_values=-1)
    return call(leave, model, at.x, (joined(segments),), past, budgets.n, propagated, static=static)


def _disagreement(method: Adaptive, at: Progress, layer: int, tokens: np.ndarray) -> float:
    """Of the layers run so far; infinite where there is nothing to drop."""
    rows = at.rows
    start, stop, window = (int(np.asarray(a)[0]) for a in (rows.start, rows.stop, rows.window))
    n = rows.positions.shape[1] - start
    if tokens[n] >= n:
        return np.inf
    scores = np.asarray(at.token_scores)[-min(layer + 1, len(at.token_scores)) :, 0, start : stop - window]
    return method.disagreement(scores, max(int(tokens[n]) - window, 1))


def _past_of(past: KVCache, layers: np.ndarray) -> SegmentKV:
    """Entries of a group of layers, joined where they lie in several runs."""
    return joined([past.run(int(i), int(i) + 1) for i in layers])


def joined(segments: list[SegmentKV]) -> SegmentKV:
    """Runs of layers as one, empty slots added in front of the shorter ones: decoding compiles once."""
    slots = max(segment.k.shape[3] for segment in segments)

    return _concatenated([segment.widened(slots) for segment in segments])


@jax.jit
def _concatenated(segments: list[SegmentKV]) -> SegmentKV:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *segments)


@jax.jit
def _stack(rows: list[Prefill]) -> Prefill:
    """Rows of one batch, each prefilled alone."""
    first = rows[0].cache
    segments = [row.cache.segments[0] for row in rows]
    entries = jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), *segments)
    k_new, v_new = (jnp.concatenate([getattr(row.cache, name) for row in rows], axis=1) for name in ("k_new", "v_new"))
    filled, position = (jnp.concatenate([getattr(row.cache, n) for row in rows]) for n in ("filled", "position"))
    cache = KVCache((entries,), k_new, v_new, first.used, filled, position)
    logits, propagated = (jnp.concatenate([getattr(row, name) for row in rows]) for name in ("logits", "propagated"))
    return Prefill(logits, cache, propagated)
