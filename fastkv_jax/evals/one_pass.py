"""One prefill for many methods: those that only compress see the same prompt go through the same layers."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastkv_jax import rope
from fastkv_jax.attention import attention
from fastkv_jax.buckets import TILE
from fastkv_jax.cache import KVCache
from fastkv_jax.inference import KERNELS, check_prompt, platform_of
from fastkv_jax.inputs import static_tail
from fastkv_jax.methods import ASL, AdaKV, CriticalKV, FullKV, Layer, Method
from fastkv_jax.methods.plan import static_plan
from fastkv_jax.model import Llama
from fastkv_jax.ops import Ops
from fastkv_jax.stages import Prefill, Shape, Static, enter, enter_budgets, keep


def in_one_pass(method: Method, num_layers: int) -> bool:
    """Whether every token goes through every layer."""
    n = np.array([1 << 20])
    return not isinstance(method, ASL) and all(run.tokens >= n for run in method.plan(n, num_layers))


def prefill_all(
    model: Llama, tokens: Any, start: Any, *, methods: Sequence[Method], max_new_tokens: int, window_end: Any = 0
) -> list[Prefill]:
    """What `prefill` of each of the methods, all of them `in_one_pass`, would give; arguments are as there."""
    prompt = check_prompt(model, tokens, start, window_end, FullKV(), max_new_tokens)
    tail = static_tail(prompt.window_end)
    c, columns = model.config, prompt.tokens.shape[1]
    shapes, tables = [], []
    for method in methods:
        stages = static_plan(method, c.num_layers, c.num_kv_heads, columns, tail, TILE)
        slots = max(stage.capacity for stage in stages)
        compresses = any(stage.compresses for stage in stages)
        shapes.append(Shape(columns, slots if compresses else None, False, stages[0].shared, False))
        per_layer = [np.broadcast_to(s.kept, (s.stop - s.first, columns + 1)) for s in stages]
        tables.append(np.concatenate(per_layer)[:, columns - np.asarray(prompt.start)].astype(np.int32))
    platform = platform_of(model)
    static = Static(FullKV(), max_new_tokens, tail, platform, KERNELS[platform])
    logits, entries = _read(model, prompt, tuple(tables), methods=tuple(methods), shapes=tuple(shapes), static=static)
    position = jnp.asarray(columns - prompt.start)
    room = max_new_tokens, c.num_kv_heads, model.dtype
    return [Prefill(logits, KVCache.empty_after((one,), position, *room), None) for one in entries]


@partial(jax.jit, static_argnames=("methods", "shapes", "static"))
def _read(model: Llama, prompt, tables, *, methods, shapes, static: Static):
    """Logits of the last tokens, and every method's entries."""
    at = enter(model, prompt, None, static=static)
    c, rows, ops = model.config, at.rows, Ops(static.kernels, model.mesh)
    cos, sin = rope.angles(c.rope, c.head_dim, jnp.maximum(rows.positions, 0))
    frequencies = jnp.asarray(rope.frequencies(c.rope, c.head_dim))
    budgets = [enter_budgets(model, prompt, static=static._replace(method=method)) for method in methods]

    def layer(x, inputs):
        index, kept = inputs
        block = model.layer(index)
        q, k, v = block.qkv(x, cos, sin)
        x = block.output(x, attention(q, k, v, rows.start, platform=static.platform, mesh=model.mesh))
        entries, known = [], {}
        for method, shape, mine, own in zip(methods, shapes, kept, budgets, strict=True):
            count = jnp.minimum(own.n, jnp.maximum(mine, own.protected))
            there = rows._replace(window=own.window)
            seen = Layer(q, k, v, *there, kept=count, frequencies=frequencies, wo=block.wo[...], ops=ops)
            key = method if isinstance(method, AdaKV | CriticalKV) else _any_budget(method)  # those look at the budget
            if key not in known:
                known[key] = seen.protect(method.scores(seen).kv)
            entries.append(keep(seen, known[key], shape))
        return x, tuple(entries)

    x, entries = lax.scan(layer, at.x, (jnp.arange(c.num_layers), tables))
    return model.logits(x[:, -1]), entries


def _any_budget(method: Method) -> Method:
    given: Any = method
    budget = {"retention_rate": 0.5, "capacity": None} if hasattr(method, "retention_rate") else {}
    return dataclasses.replace(given, **budget)
