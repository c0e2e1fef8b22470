"""Prefill, decode, generate. One program for every method: it knows a plan and scores, never a name.

tokens -> [layers of stage 0] -> choose rows -> [layers of stage 1] -> ... -> logits of the last token
              |                                    |
              keep entries                         keep entries        -> cache -> decode, decode, ...
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from fastkv_jax import rope
from fastkv_jax.attention import Platform, attention
from fastkv_jax.buckets import TILE
from fastkv_jax.cache import KVCache, SegmentKV
from fastkv_jax.errors import CheckpointError, InputError
from fastkv_jax.inputs import Prompt, check_batch, static_tail
from fastkv_jax.methods.base import Method, Rows, static_plan
from fastkv_jax.model import Llama
from fastkv_jax.sampling import Greedy, Sampler
from fastkv_jax.select import choose
from kernels_pallas import decode_attention

CHUNK = 8  # decode steps per call of the compiled loop: what a stream shows at once
GROUP = 5  # layers per call where progress is reported


@struct.dataclass
class Prefill:
    """What a prompt leaves behind."""

    logits: Float[Array, "B V"]  # of each row's last token, float32
    cache: KVCache
    propagated: (
        Int[Array, "B S"] | None
    )  # prompt positions that passed the last TSP layer, -1 = empty; None without one


@struct.dataclass
class Generated:
    """Tokens chosen for each row; after a stop token (which is counted) come pad ids."""

    tokens: Int[Array, "B M"]
    lengths: Int[Array, " B"]


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


def _decode(model: Llama, token: Int[Array, " B"], cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
    x = model.embed(token[:, None])
    cos, sin = rope.angles(model.config.rope, model.config.head_dim, cache.position[:, None])

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
        out = decode_attention(q[:, :, 0], entries.k, entries.v, entries.positions, k_mine, v_mine, cache.used + 1)
        return (block.output(x, out[:, :, None]), k_new, v_new), None

    carry, first = (x, cache.k_new, cache.v_new), 0
    for segment in cache.segments:
        layers = jnp.arange(first, first + segment.k.shape[0])
        carry, _ = lax.scan(layer, carry, (layers, segment))
        first += segment.k.shape[0]
    x, k_new, v_new = carry
    cache = dataclasses.replace(cache, k_new=k_new, v_new=v_new, used=cache.used + 1, position=cache.position + 1)
    return model.logits(x[:, 0]), cache


_decode_jit = jax.jit(_decode, donate_argnames=("cache",))


# ---------------------------------------------------------------------------------------------------------------------
# Generate
# ---------------------------------------------------------------------------------------------------------------------


@struct.dataclass
class _Loop:
    """Where the decode loop stands after `count` tokens."""

    token: Int[Array, " B"]  # the last one of each row
    done: Bool[Array, " B"]  # rows that met a stop token
    finite: Bool[Array, ""]  # no NaN or infinity among the logits so far
    count: Int[Array, ""]
    key: Key[Array, ""]
    new: tuple[Array, Array, Array, Array]  # the parts of the cache that change: k_new, v_new, used, position


@partial(jax.jit, static_argnames=("sampler", "stop_tokens"))
def _first_token(prompt: Prefill, key, *, sampler: Sampler, stop_tokens: tuple[int, ...]) -> _Loop:
    """The first token comes from the prompt's own logits."""
    key, now = jax.random.split(key)
    token = sampler(prompt.logits, now)
    cache = prompt.cache
    new = (cache.k_new, cache.v_new, cache.used, cache.position)
    finite = jnp.isfinite(prompt.logits).all()
    return _Loop(token, _is_stop(token, stop_tokens), finite, jnp.ones((), jnp.int32), key, new)


@partial(jax.jit, static_argnames=("sampler", "stop_tokens", "pad_token"), donate_argnames=("loop",))
def _decode_chunk(model, segments, loop: _Loop, limit, *, sampler, stop_tokens, pad_token):
    """Up to CHUNK steps of decode and sample; steps after the end of all rows or of the limit do nothing."""

    def step(loop: _Loop, _):
        def go(loop: _Loop):
            logits, cache = _decode(model, loop.token, KVCache(segments, *loop.new))
            key, now = jax.random.split(loop.key)
            token = jnp.where(loop.done, pad_token, sampler(logits, now))
            finite = loop.finite & (jnp.isfinite(logits).all(axis=-1) | loop.done).all()
            new = (cache.k_new, cache.v_new, cache.used, cache.position)
            return _Loop(token, loop.done | _is_stop(token, stop_tokens), finite, loop.count + 1, key, new)

        def rest(loop: _Loop):
            return dataclasses.replace(loop, token=jnp.full_like(loop.token, pad_token))

        loop = lax.cond(loop.done.all() | (loop.count >= limit), rest, go, loop)
        return loop, loop.token

    return lax.scan(step, loop, length=CHUNK)


def _is_stop(token: Int[Array, " B"], stop_tokens: tuple[int, ...]) -> Bool[Array, " B"]:
    return (token[:, None] == jnp.asarray(stop_tokens or (-1,), jnp.int32)).any(axis=-1)


def decode_chunks(
    model: Llama,
    prompt: Prefill,
    *,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),  # noqa: B008 - a frozen value
    stop_tokens: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens as they are made: (tokens [B, c] int32, done [B]), the first token alone, then up to CHUNK at a time.

    `prompt`'s cache is donated. Ends early when every row has met a stop token. Raises `InputError` if the cache has
    no room, `CheckpointError` at the first logits that are not finite.
    """
    if max_new_tokens > prompt.cache.max_new_tokens + 1:
        raise InputError(f"max_new_tokens={max_new_tokens} > {prompt.cache.max_new_tokens}, the room in the cache")
    if max_new_tokens < 1:
        return
    stops, pad = _stops(model, stop_tokens), model.config.pad_token or 0
    loop = _first_token(prompt, _key(sampler, key), sampler=sampler, stop_tokens=stops)
    _check_finite(loop, 0)
    yield np.asarray(loop.token)[:, None], np.asarray(loop.done)
    made = 1
    while made < max_new_tokens and not np.asarray(loop.done).all():
        loop, chunk = _decode_chunk(
            model, prompt.cache.segments, loop, max_new_tokens, sampler=sampler, stop_tokens=stops, pad_token=pad
        )
        _check_finite(loop, made)
        count = int(loop.count) - made
        made += count
        yield np.asarray(chunk)[:count].T, np.asarray(loop.done)


def compile_decode(
    model: Llama,
    prompt: Prefill,
    *,
    sampler: Sampler = Greedy(),  # noqa: B008 - a frozen value
    stop_tokens: Sequence[int] | None = None,
) -> jax.stages.Compiled:
    """Compile what `decode_chunks` with these arguments will run, so that it starts at once."""
    stops, pad = _stops(model, stop_tokens), model.config.pad_token or 0
    loop = _first_token(prompt, jax.random.key(0), sampler=sampler, stop_tokens=stops)
    options = {"sampler": sampler, "stop_tokens": stops, "pad_token": pad}
    return _decode_chunk.lower(model, prompt.cache.segments, loop, 1, **options).compile()


def _stops(model: Llama, stop_tokens: Sequence[int] | None) -> tuple[int, ...]:
    return model.config.stop_tokens if stop_tokens is None else tuple(int(t) for t in stop_tokens)


def _key(sampler: Sampler, key: Key[Array, ""] | None) -> Key[Array, ""]:
    if key is None and not isinstance(sampler, Greedy):
        raise InputError(f"{type(sampler).__name__} needs key=jax.random.key(seed)")
    return jax.random.key(0) if key is None else key


def _check_finite(loop: _Loop, step: int) -> None:
    if not loop.finite:
        raise CheckpointError(f"non-finite logits at step {step}; run with --check-weights (check_weights=True)")


def generate(
    model: Llama,
    tokens: Any,
    start: Any = None,
    *,
    method: Method,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),  # noqa: B008 - a frozen value
    stop_tokens: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
    window_end: Any = 0,
    platform: Platform | None = None,
) -> Generated:
    """Prefill, then decode until every row met a stop token or `max_new_tokens` are made; arguments as in `prefill`.

    `stop_tokens` None means the checkpoint's own list, () none.
    """
    prompt = prefill(
        model, tokens, start, method=method, max_new_tokens=max_new_tokens, window_end=window_end, platform=platform
    )
    batch = prompt.logits.shape[0]
    out = np.full((batch, max_new_tokens), model.config.pad_token or 0, np.int32)
    lengths, running, made = np.zeros(batch, np.int32), np.ones(batch, bool), 0
    stops = _stops(model, stop_tokens)
    for chunk, done in decode_chunks(
        model, prompt, max_new_tokens=max_new_tokens, sampler=sampler, stop_tokens=stops, key=key
    ):
        out[:, made : made + chunk.shape[1]] = chunk
        ended = np.isin(chunk, stops).cumsum(axis=1)
        counted = chunk.shape[1] - (ended > 0).sum(axis=1) + ended.any(axis=1)
        lengths += np.where(running, counted, 0)
        running, made = ~done, made + chunk.shape[1]
    return Generated(jnp.asarray(out), jnp.asarray(lengths))
