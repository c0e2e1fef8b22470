"""Prefill and decode. One program for every method: it knows a plan and scores, never a name.

tokens -> [layers of stage 0] -> choose rows -> [layers of stage 1] -> ... -> logits of the last token
              |                                    |
              keep entries                         keep entries        -> cache -> decode, decode, ...
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from fastkv_jax import rope
from fastkv_jax.attention import Platform, attention
from fastkv_jax.buckets import TILE
from fastkv_jax.cache import KVCache, SegmentKV
from fastkv_jax.errors import InputError
from fastkv_jax.inputs import Prompt, check_batch, static_tail
from fastkv_jax.methods.base import Method, Rows, static_plan
from fastkv_jax.model import Llama
from fastkv_jax.select import choose
from kernels_pallas import decode_attention

GROUP = 5  # layers per call where progress is reported


@struct.dataclass
class Prefill:
    """What a prompt leaves behind."""

    logits: Float[Array, "B V"]  # of each row's last token, float32
    cache: KVCache
    propagated: Int[Array, "B S"] | None  # prompt positions that passed the last TSP layer, -1 = empty


# ---------------------------------------------------------------------------------------------------------------------
# Prefill
# ---------------------------------------------------------------------------------------------------------------------


def prefill(
    model: Llama,
    tokens: Any,
    start: Any = None,
    *,
    method: Method,
    max_new_tokens: int,
    window_end: Any = 0,
    platform: Platform | None = None,
    progress: Callable[[int], object] | None = None,
) -> Prefill:
    """Read a batch of left-padded prompts: logits of their last tokens, and a cache of what the method keeps.

    tokens          [B, T] int32, rows right-aligned; start [B] the first valid column, 0 if None
    max_new_tokens  room for decoded tokens in the cache; 0 is allowed
    window_end      tokens after the end of the question (a chat template's tail), one number or [B]: the observation
                    window ends before them, and they are always kept
    platform        "cpu", "gpu" or "tpu"; None: where the weights are
    progress        called with the number of layers done since the last call; the layers then run in several calls

    Compiles once per (method, T, B, max_new_tokens). NumPy arrays and lists are checked here (`InputError`,
    `FastKVConfigError`), traced arrays are not: budgets are looked up by traced length, exact in either case.
    """
    prompt = check_prompt(model, tokens, start, window_end, method, max_new_tokens)
    static = Static(method, max_new_tokens, static_tail(prompt.window_end), platform or platform_of(model))
    if progress is None:
        return _prefill_jit(model, prompt, static=static)
    return _prefill(model, prompt, static, group=GROUP, progress=progress)


def compile_prefill(
    model: Llama,
    tokens: Any,
    start: Any = None,
    *,
    method: Method,
    max_new_tokens: int,
    window_end: Any = 0,
    platform: Platform | None = None,
    progress: bool = False,
) -> None:
    """Compile what `prefill` with these arguments, with or without `progress`, will run, so that it starts at once."""
    prompt = check_prompt(model, tokens, start, window_end, method, max_new_tokens)
    static = Static(method, max_new_tokens, static_tail(prompt.window_end), platform or platform_of(model))
    if progress:
        jax.eval_shape(lambda prompt: _prefill(model, prompt, static, _compile_and_call, GROUP), prompt)
    else:
        _prefill_jit.lower(model, prompt, static=static).compile()


def check_prompt(model: Llama, tokens: Any, start: Any, window_end: Any, method: Method, max_new_tokens: int) -> Prompt:
    """The arguments of `prefill` as arrays, or `InputError` / `FastKVConfigError`."""
    method.check(model.config.num_layers)
    return check_batch(tokens, start, window_end, model.config, max_new_tokens)


def platform_of(model: Llama) -> Platform:
    """Where the model's weights live; where jax would put them if they are traced."""
    weights = model.norm[...]
    name = jax.default_backend() if isinstance(weights, Tracer) else next(iter(weights.devices())).platform
    return "gpu" if name in ("gpu", "cuda", "rocm") else "tpu" if name == "tpu" else "cpu"


class Static(NamedTuple):
    """What a compiled prefill depends on besides shapes."""

    method: Method
    max_new_tokens: int
    tail: int  # an upper bound of window_end
    platform: Platform


def _call(program: Callable[..., Any], *args: Any, **static: Any) -> Any:
    return program(*args, **static)


def _compile_and_call(program: Any, *args: Any, **static: Any) -> Any:
    """Compile a program for arguments of which only the shapes are known, and pass on the shapes of its results."""
    shapes = [
        a if isinstance(a, Llama) else jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), a) for a in args
    ]
    program.lower(*shapes, **static).compile()
    return program(*args, **static)


def _prefill(
    model: Llama,
    prompt: Prompt,
    static: Static,
    call: Callable[..., Any] = _call,
    group: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Prefill:
    """The whole algorithm: run a stage's layers, keep entries, choose the rows that go on, run the next stage's.

    Its programs go through `call`: parts of one program if this is traced, else each its own. `group` limits the
    layers of one call.
    """
    stages = static_plan(static.method, model.config.num_layers, prompt.tokens.shape[1], static.tail, TILE)
    x, rows, n, protected = call(_enter, model, prompt, static=static)
    token_scores, budget, propagated, segments = None, n, None, []
    for stage in stages:
        if stage.propagates:
            budget = call(_budget, stage.tokens, n, n, protected)
            x, rows = call(_propagate, x, rows, token_scores, budget, width=stage.width)
            propagated = rows.positions
        kept = call(_budget, stage.kept, n, budget, protected)
        capacity = stage.capacity if stage.compresses else None
        size = group or max(stage.stop - stage.first, 1)
        for first in range(stage.first, stage.stop, size):
            layers = np.arange(first, min(first + size, stage.stop))
            x, token_scores, entries = call(_run_layers, model, x, rows, kept, layers, capacity=capacity, static=static)
            segments.append(entries)
            if progress is not None:
                jax.block_until_ready(entries)
                progress(len(layers))
    return call(_leave, model, x, tuple(segments), n, propagated, static=static)


@partial(jax.jit, static_argnames=("static",))
def _enter(model: Llama, prompt: Prompt, *, static: Static):
    """(hidden rows, where they stand, true lengths, how many of the last rows must always stay)."""
    columns = prompt.tokens.shape[1]
    position = jnp.arange(columns) - prompt.start[:, None]
    rows = Rows(jnp.maximum(position, -1), prompt.start, jnp.asarray(columns - prompt.window_end))
    window = static.method.window_size
    protected = window + prompt.window_end if window else jnp.zeros_like(prompt.start)
    return model.embed(prompt.tokens), rows, columns - prompt.start, protected


@jax.jit
def _budget(table: Int[Array, " T"], n, limit, protected):
    """The exact budget of each row: looked up by its true length, never less than what must stay, within the limit."""
    return jnp.minimum(limit, jnp.maximum(table[n], protected))


@partial(jax.jit, static_argnames=("width",))
def _propagate(x, rows: Rows, token_scores, budget, *, width: int):
    """Token-selective propagation: the best `budget` rows go on, in the order of the text."""
    chosen = choose(token_scores, budget, width)
    tail = rows.positions.shape[1] - rows.stop
    return chosen.take(x, 0), Rows(chosen.take(rows.positions, -1), width - budget, width - tail)


@partial(jax.jit, static_argnames=("capacity", "static"))
def _run_layers(model: Llama, x, rows: Rows, kept, layers, *, capacity: int | None, static: Static):
    """(hidden rows, token scores of the last layer, what each of these layers keeps: all if capacity is None)."""
    chex.assert_rank([x, rows.positions, kept], [3, 2, 1])
    chex.assert_equal_shape_prefix([x, rows.positions], 2)
    cos, sin = rope.angles(model.config.rope, model.config.head_dim, jnp.maximum(rows.positions, 0))

    def layer(carry, index):
        x, _ = carry
        block = model.layer(index)
        q, k, v = block.qkv(x, cos, sin)
        with jax.named_scope("attention"):
            x = block.output(x, attention(q, k, v, rows.start, platform=static.platform, mesh=model.mesh))
        with jax.named_scope("compress"):
            scores = static.method.scores(q, k, v, rows)
            entries = _keep(k, v, rows, scores.kv, kept, capacity)
        return (x, scores.tokens), entries

    nothing = jnp.zeros(rows.positions.shape, jnp.float32)
    (x, token_scores), entries = lax.scan(layer, (x, nothing), layers)
    return x, token_scores, entries


def _keep(k, v, rows: Rows, kv_scores, kept, capacity: int | None) -> SegmentKV:
    """The `kept` best entries of each cache head."""
    heads = kv_scores.shape[1]
    positions = jnp.broadcast_to(rows.positions[:, None], (k.shape[0], heads, k.shape[2]))
    k, v = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))  # a cache per query head, where published so
    if capacity is None:
        return SegmentKV(k, v, positions)
    chosen = choose(kv_scores, kept[:, None], capacity)
    return SegmentKV(chosen.take(k, 0), chosen.take(v, 0), chosen.take(positions, -1))


@partial(jax.jit, static_argnames=("static",))
def _leave(model: Llama, x, segments: tuple[SegmentKV, ...], n, propagated, *, static: Static) -> Prefill:
    """Logits of the last row, and the cache with an empty buffer for decoded tokens."""
    c = model.config
    shape = (c.num_layers, x.shape[0], c.num_kv_heads, static.max_new_tokens, c.head_dim)
    k_new, v_new = jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)
    cache = KVCache(segments, k_new, v_new, jnp.zeros((), jnp.int32), n)
    return Prefill(model.logits(x[:, -1]), cache, propagated)


_prefill_jit = jax.jit(_prefill, static_argnames=("static",))


# ---------------------------------------------------------------------------------------------------------------------
# Decode
# ---------------------------------------------------------------------------------------------------------------------


def decode_step(model: Llama, token: Any, cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
    """Feed one token [B] per row: the logits that follow it, and the cache with its entries. The cache is donated.

    Raises `InputError` when the cache has no room left, never a clamped write (a traced cache is not checked).
    """
    if not isinstance(cache.used, Tracer) and int(cache.used) >= cache.max_new_tokens:
        slots = max(segment.k.shape[3] for segment in cache.segments) + cache.max_new_tokens
        raise InputError(f"cache is full ({slots}/{slots}): it has room for max_new_tokens={cache.max_new_tokens}")
    return _decode_jit(model, jnp.asarray(token, jnp.int32), cache)


def decode(model: Llama, token: Int[Array, " B"], cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
    """One step without checks, jit or donation, to be a part of a larger program."""
    x = model.embed(token[:, None])
    cos, sin = rope.angles(model.config.rope, model.config.head_dim, cache.position[:, None])
    filled = jnp.broadcast_to(cache.used + 1, token.shape)

    def layer(carry, inputs):
        x, k_new, v_new = carry
        index, entries = inputs
        block = model.layer(index)
        q, k, v = block.qkv(x, cos, sin)
        k_new, v_new = (
            lax.dynamic_update_slice(buffer, a[None], (index, 0, 0, cache.used, 0))
            for buffer, a in ((k_new, k), (v_new, v))
        )
        k_mine, v_mine = (lax.dynamic_index_in_dim(buffer, index, keepdims=False) for buffer in (k_new, v_new))
        out = decode_attention(q[:, :, 0], entries.k, entries.v, entries.positions, k_mine, v_mine, filled)
        return (block.output(x, out[:, :, None]), k_new, v_new), None

    carry, first = (x, cache.k_new, cache.v_new), 0
    for segment in cache.segments:
        layers = jnp.arange(first, first + segment.k.shape[0])
        carry, _ = lax.scan(layer, carry, (layers, segment))
        first += segment.k.shape[0]
    x, k_new, v_new = carry
    cache = dataclasses.replace(cache, k_new=k_new, v_new=v_new, used=cache.used + 1, position=cache.position + 1)
    return model.logits(x[:, 0]), cache


_decode_jit = jax.jit(decode, donate_argnames=("cache",))
