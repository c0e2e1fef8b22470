"""One prefill for many methods: those that only compress see the same prompt go through the same layers."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastkv_jax.methods import FullKV, Method
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.platforms import Kernels
from fastkv_jax.prefilling.adaptive import Adaptive
from fastkv_jax.prefilling.doors import Prefill, prepare
from fastkv_jax.prefilling.layers import Own, Reader, Static, budget, enter, enter_budgets, leave, run_layers
from fastkv_jax.prefilling.passes import stages_of
from fastkv_jax.prefilling.prompt import Prompt


def in_one_pass(method: Method, num_layers: int) -> bool:
    """Whether every token goes through every layer."""
    n = np.array([1 << 20])
    return not isinstance(method, Adaptive) and all(run.tokens >= n for run in method.plan(n, num_layers))


def prefill_all(
    model: Llama,
    tokens: Any,
    start: Any = None,
    *,
    methods: Sequence[Method],
    max_new_tokens: int,
    window_end: Any = 0,
    kernels: Kernels | None = None,
    kv_dtype: str | None = None,
) -> list[Prefill]:
    """What `prefill` of each of the methods, all of them `in_one_pass`, would give, in their order.

    Arguments, and the errors they raise, are as there: tokens [B, T] int32, start [B], window_end one number or [B].
    """
    full = prepare(
        model, tokens, start, method=FullKV(), max_new_tokens=max_new_tokens, window_end=window_end, kernels=kernels,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    return list(_read(model, full.prompt, methods=tuple(methods), static=full.static))


@partial(jax.jit, static_argnames=("methods", "static"))
def _read(model: Llama, prompt: Prompt, *, methods: tuple[Method, ...], static: Static) -> tuple[Prefill, ...]:
    at = enter(model, prompt, None, static=static)
    n = enter_budgets(model, prompt, static=static)
    readers, own = [Reader(FullKV(), 0)], [Own(n.n[None], n.window)]  # of the rows, all of which go on
    for method in methods:
        reader, mine = _reader(model, prompt, static._replace(method=method))
        readers.append(reader)
        own.append(mine)
    layers = np.arange(model.config.num_layers)
    at, (_, *entries) = run_layers(model, at, tuple(own), layers, None, readers=tuple(readers), static=static)
    return tuple(leave(model, at.x, (one,), None, n.n, None, static=static) for one in entries)


def _reader(model: Llama, prompt: Prompt, static: Static) -> tuple[Reader, Own]:
    """Slots for the layer that keeps most, and the exact budgets of all."""
    stages, budgets = stages_of(model, prompt, static), enter_budgets(model, prompt, static=static)
    tables = np.concatenate([np.broadcast_to(s.kept, (s.stop - s.first, s.kept.shape[1])) for s in stages])
    kept = budget(jnp.asarray(tables), budgets, budgets.n)
    compresses, shared = any(stage.compresses for stage in stages), stages[0].shared
    slots = max(stage.capacity for stage in stages)
    capacity = slots if compresses or shared else None
    return Reader(static.method, capacity, shared, _any_budget(static.method)), Own(kept, budgets.window)


def _any_budget(method: Method) -> Method | None:
    """The method as it is but for its budget, which its scores do not look at; None if they do."""
    given: Any = method
    if getattr(given, "scores_need_budget", True) or given.retention_rate is given.capacity is None:
        return None
    return dataclasses.replace(given, retention_rate=0.5, capacity=None)
