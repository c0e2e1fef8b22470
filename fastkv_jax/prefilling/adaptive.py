"""Prefill for methods that choose their TSP layer while the prompt runs: decided on the host, between compiled layers.

Every layer is the same few programs whatever the decision, so no prompt compiles anything new; rows of a batch are
read one after the other, because each may choose another layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.methods.base import Method
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.layers import Prefill, Static
from fastkv_jax.prefilling.passes import Pass, call, compile_and_call, stages_of
from fastkv_jax.prefilling.prompt import Prompt


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


@dataclass(frozen=True)
class HostDecided:
    """A prefill whose method is `Adaptive`."""

    model: Llama
    prompt: Prompt
    past: KVCache | None
    static: Static

    def run(self, report: Callable[[int], object] | None = None) -> Prefill:
        """Row after row; the last one reports its layers."""
        return self._rows(call, report, _disagreement)

    def compile(self, report: Callable[[int], object] | None = None) -> None:
        """Compile what `run` will call, which is the same with a report and without."""

        def every_program(prompt: Prompt, past: KVCache | None) -> Prefill:
            values = chain([1.0], repeat(0.0))  # as if the layer after the first were chosen
            return replace(self, prompt=prompt, past=past)._rows(compile_and_call, None, lambda *_: next(values))

        jax.eval_shape(every_program, self.prompt, self.past)

    def _rows(self, call, report, disagreement: Callable[..., float]) -> Prefill:
        batch = self.prompt.tokens.shape[0]
        done = []
        for b in range(batch):
            tokens, start = (lax.dynamic_slice_in_dim(a, b, 1) for a in (self.prompt.tokens, self.prompt.start))
            one = Prompt(tokens, start, self.prompt.window_end[b : b + 1])
            past = None if self.past is None else self.past.row(b)
            on = Pass(self.model, one, past, self.static, call, report if b == batch - 1 else None)
            done.append(_one_row(on, disagreement))
        return done[0] if batch == 1 else call(_stack, done)


def _one_row(on: Pass, disagreement: Callable[..., float]) -> Prefill:
    method, layers = on.static.method, on.model.config.num_layers
    assert isinstance(method, Adaptive)
    before, *rest = stages_of(on.model, on.prompt, on.static._replace(method=method.at(0)))
    after = rest[0] if rest else None  # None: every prompt of this bucket fits
    on.enter(before)
    first, first_value = method.first_layer(layers), None
    for group in [range(first + 1), *(range(i, i + 1) for i in range(first + 1, layers))]:
        on.layers(group)
        if after is not None and on.stage is before and group[-1] < layers - 1:
            value = disagreement(method, on, group[-1], after.tokens)
            first_value = value if first_value is None else first_value
            if value < method.threshold * first_value:
                on.enter(after)
    on.join()
    passed = on.at.rows.positions  # all of them if no layer was chosen, in as many columns
    on.propagated = jnp.pad(passed, ((0, 0), (before.width - passed.shape[1], 0)), constant_values=-1)
    return on.finish()


def _disagreement(method: Adaptive, on: Pass, layer: int, tokens: np.ndarray) -> float:
    """Of the layers run so far; infinite where there is nothing to drop."""
    at, rows = on.at, on.at.rows
    start, stop, window = (int(np.asarray(a)[0]) for a in (rows.start, rows.stop, on.budgets.window))
    n = rows.positions.shape[1] - start
    if tokens[n] >= n:
        return np.inf
    scores = np.asarray(at.token_scores)[-min(layer + 1, len(at.token_scores)) :, 0, start : stop - window]
    return method.disagreement(scores, max(int(tokens[n]) - window, 1))


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
