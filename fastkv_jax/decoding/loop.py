"""The decode loop: a scan of decode and sample, a few steps per call, over the part of the cache that changes.

prefill -> first token -> [decode, sample] x CHUNK -> tokens to the host -> [decode, sample] x CHUNK -> ...
"""

import dataclasses
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.decoding.sampling import Greedy, Sampler
from fastkv_jax.decoding.step import decode
from fastkv_jax.errors import CheckpointError, InputError
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.platforms import KERNELS, Kernels
from fastkv_jax.prefilling.doors import Prefill, PrefillOptions, prefill

CHUNK = 8  # decode steps per call of the compiled loop: what a stream shows at once


@struct.dataclass
class Generated:
    """Tokens chosen for each row; after a stop token (which is counted) come pad ids."""

    tokens: Int[Array, "B M"]
    lengths: Int[Array, " B"]
    cache: KVCache  # prompt and answer, but for each answer's last token, which nobody has fed yet


@struct.dataclass
class _Loop:
    """Where the decode loop stands after `count` tokens."""

    token: Int[Array, " B"]  # the last one of each row
    done: Bool[Array, " B"]  # rows that met a stop token
    finite: Bool[Array, ""]  # no NaN or infinity among the logits so far
    count: Int[Array, ""]
    key: Key[Array, ""]
    new: tuple[Array, ...]  # the parts of the cache that change, see `_changing`


def _changing(cache: KVCache) -> tuple[Array, ...]:
    return cache.k_new, cache.v_new, cache.used, cache.filled, cache.position


@partial(jax.jit, static_argnames=("sampler", "stop_tokens"))
def _first_token(prompt: Prefill, key, *, sampler: Sampler, stop_tokens: tuple[int, ...]) -> _Loop:
    """The first token comes from the prompt's own logits."""
    key, now = jax.random.split(key)
    token = sampler(prompt.logits, now)
    finite = jnp.isfinite(prompt.logits).all()
    new = _changing(prompt.cache)
    return _Loop(token, _is_stop(token, stop_tokens), finite, jnp.ones((), jnp.int32), key, new)


@partial(jax.jit, static_argnames=("sampler", "stop_tokens", "pad_token", "kernels"), donate_argnames=("loop",))
def _decode_chunk(model, segments, loop: _Loop, limit, *, sampler, stop_tokens, pad_token, kernels: Kernels):
    """Up to CHUNK steps of decode and sample; steps after the end of all rows or of the limit do nothing."""

    def step(loop: _Loop, _):
        def go(loop: _Loop):
            logits, cache = decode(model, loop.token, KVCache(segments, *loop.new), ~loop.done, kernels=kernels)
            key, now = jax.random.split(loop.key)
            token = jnp.where(loop.done, pad_token, sampler(logits, now))
            finite = loop.finite & (jnp.isfinite(logits).all(axis=-1) | loop.done).all()
            done = loop.done | _is_stop(token, stop_tokens)
            return _Loop(token, done, finite, loop.count + 1, key, _changing(cache))

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
    kernels: Kernels | None = None,
) -> Generator[tuple[np.ndarray, np.ndarray], None, KVCache]:
    """Tokens as they are made: (tokens [B, c] int32, done [B]), the first token alone, then up to CHUNK at a time.

    The generator's own return value is the cache as it stands at the end.
    `prompt`'s cache is donated. Ends early when every row has met a stop token. Raises `InputError` if the cache has
    no room, `CheckpointError` at the first logits that are not finite.
    """
    if max_new_tokens > prompt.cache.max_new_tokens + 1:
        raise InputError(f"max_new_tokens={max_new_tokens} > {prompt.cache.max_new_tokens}, the room in the cache")
    if max_new_tokens < 1:
        return prompt.cache
    stops = _stops(model, stop_tokens)
    options = _options(model, sampler, stops, kernels)
    loop = _first_token(prompt, _key(sampler, key), sampler=sampler, stop_tokens=stops)
    _check_finite(loop, 0)
    yield np.asarray(loop.token)[:, None], np.asarray(loop.done)
    made = 1
    while made < max_new_tokens and not np.asarray(loop.done).all():
        loop, chunk = _decode_chunk(model, prompt.cache.segments, loop, max_new_tokens, **options)
        _check_finite(loop, made)
        count = int(loop.count) - made
        made += count
        yield np.asarray(chunk)[:count].T, np.asarray(loop.done)
    return KVCache(prompt.cache.segments, *loop.new)


def compile_decode(
    model: Llama,
    prompt: Prefill,
    *,
    sampler: Sampler = Greedy(),  # noqa: B008 - a frozen value
    stop_tokens: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> jax.stages.Compiled:
    """Compile what `decode_chunks` with these arguments will run, so that it starts at once."""
    stops = _stops(model, stop_tokens)
    loop = _first_token(prompt, jax.random.key(0), sampler=sampler, stop_tokens=stops)
    options = _options(model, sampler, stops, kernels)
    return _decode_chunk.lower(model, prompt.cache.segments, loop, 1, **options).compile()


def _options(model: Llama, sampler: Sampler, stops: tuple[int, ...], kernels: Kernels | None) -> dict[str, Any]:
    kernels = kernels or KERNELS[model.platform]
    pad = model.config.pad_token or 0
    return {"sampler": sampler, "stop_tokens": stops, "pad_token": pad, "kernels": kernels}


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
    sampler: Sampler = Greedy(),  # noqa: B008 - a frozen value
    stop_tokens: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
    **options: Unpack[PrefillOptions],
) -> Generated:
    """Prefill, then decode until every row met a stop token or `max_new_tokens` are made; options as in `prefill`.

    `stop_tokens` None means the checkpoint's own list, () none. For the next turn pass the result's `cache`, and begin
    its tokens with the last token of this answer.

    >>> import fastkv_jax as fk
    >>> model, tokenizer = fk.load_model("smollm2-135m", dtype="float32"), fk.load_tokenizer("smollm2-135m")
    >>> tokens, start = fk.pad_batch([tokenizer.encode("One, two, three, four,")])
    >>> made = fk.generate(model, tokens, start, method=fk.FullKV(), max_new_tokens=4)
    >>> tokenizer.decode(made.tokens[0])
    ' five, six,'
    """
    prompt = prefill(model, tokens, start, **options)
    max_new_tokens, kernels = options["max_new_tokens"], options.get("kernels")
    batch = prompt.logits.shape[0]
    out = np.full((batch, max_new_tokens), model.config.pad_token or 0, np.int32)
    lengths, running, made = np.zeros(batch, np.int32), np.ones(batch, bool), 0
    stops = _stops(model, stop_tokens)
    chunks = decode_chunks(
        model, prompt, max_new_tokens=max_new_tokens, sampler=sampler, stop_tokens=stops, key=key, kernels=kernels
    )
    while True:
        try:
            chunk, done = next(chunks)
        except StopIteration as end:
            return Generated(jnp.asarray(out), jnp.asarray(lengths), end.value)
        out[:, made : made + chunk.shape[1]] = chunk
        ended = np.isin(chunk, stops).cumsum(axis=1)
        counted = chunk.shape[1] - (ended > 0).sum(axis=1) + ended.any(axis=1)
        lengths += np.where(running, counted, 0)
        running, made = ~done, made + chunk.shape[1]
