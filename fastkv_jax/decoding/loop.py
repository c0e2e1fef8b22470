"""The decode loop: decode and sample, a few steps per call, over the part of the cache that changes.

prefill -> first token -> [decode, sample] x CHUNK -> tokens to the host -> [decode, sample] x CHUNK -> ...
"""

from collections.abc import Callable, Iterator, Sequence
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
    """Up to CHUNK steps of decode and sample, and their tokens [CHUNK, B].

    A step after the end of all rows or of the limit changes nothing that counts: its entry goes where the next one
    will, or nowhere. A GPU takes it all the same, so that the number of turns is known when it is compiled: otherwise
    the host would ask after each one, and a branch would copy the buffers.
    """

    def ended(loop: _Loop) -> Bool[Array, ""]:
        return loop.done.all() | (loop.count >= limit)

    def step(index, carry):
        loop, made = carry
        rest = loop.done | ended(loop)
        logits, cache = decode(model, loop.token, KVCache(segments, *loop.new), ~rest, kernels=kernels)
        key, now = jax.random.split(loop.key)
        token = jnp.where(rest, pad_token, sampler(logits, now))
        finite = loop.finite & (jnp.isfinite(logits).all(axis=-1) | rest).all()
        count = loop.count + jnp.where(ended(loop), 0, 1)
        done = loop.done | (_is_stop(token, stop_tokens) & ~rest)
        loop = _Loop(token, done, finite, count, key, _changing(cache))
        return loop, lax.dynamic_update_index_in_dim(made, token, index, 0)

    carry = loop, jnp.full((CHUNK, *loop.token.shape), pad_token, loop.token.dtype)
    if kernels == "gpu":
        return lax.fori_loop(0, CHUNK, step, carry)
    more = lambda at: (at[0] < CHUNK) & ~ended(at[1][0])  # noqa: E731
    return lax.while_loop(more, lambda at: (at[0] + 1, step(*at)), (0, carry))[1]


def _is_stop(token: Int[Array, " B"], stop_tokens: tuple[int, ...]) -> Bool[Array, " B"]:
    return (token[:, None] == jnp.asarray([stop_tokens or (-1,)], jnp.int32)).any(axis=-1)


class Decoding(Iterator[tuple[np.ndarray, np.ndarray]]):
    """Tokens as they are made: (tokens [B, c] int32, done [B]), the first token alone, then up to CHUNK at a time.

    `cache` is what prompt and answer have left so far. Ends early when every row has met a stop token. Raises
    `CheckpointError` at the first logits that are not finite.
    """

    def __init__(self, model: Llama, prompt: Prefill, loop: _Loop | None, max_new_tokens: int, options: dict[str, Any]):
        self._model, self._segments, self._limit, self._options = model, prompt.cache.segments, max_new_tokens, options
        self._loop, self._made = loop, 0
        self.cache = prompt.cache

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        if self._loop is None or self._made >= self._limit or (self._made and np.asarray(self._loop.done).all()):
            raise StopIteration
        if not self._made:
            chunk = np.asarray(self._loop.token)[:, None]
        else:
            self._loop, made = _decode_chunk(self._model, self._segments, self._loop, self._limit, **self._options)
            chunk = np.asarray(made)[: int(self._loop.count) - self._made].T
        if not self._loop.finite:
            told = "run with --check-weights (check_weights=True)"
            raise CheckpointError(f"non-finite logits at step {self._made}; {told}")
        self._made += chunk.shape[1]
        self.cache = KVCache(self._segments, *self._loop.new)
        return chunk, np.asarray(self._loop.done)


def decode_chunks(
    model: Llama,
    prompt: Prefill,
    *,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),  # noqa: B008 - a frozen value
    stop_tokens: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
    kernels: Kernels | None = None,
) -> Decoding:
    """The tokens after a prompt, whose cache is donated. Raises `InputError` if the cache has no room for them."""
    if max_new_tokens > prompt.cache.max_new_tokens + 1:
        raise InputError(f"max_new_tokens={max_new_tokens} > {prompt.cache.max_new_tokens}, the room in the cache")
    stops = _stops(model, stop_tokens)
    options, loop = _options(model, sampler, stops, kernels), None
    if options["kernels"] == "gpu":
        prompt = prompt.replace(cache=prompt.cache.in_runs(model.mesh))  # pyright: ignore
    if max_new_tokens > 0:
        loop = _first_token(prompt, _key(sampler, key), sampler=sampler, stop_tokens=stops)
    return Decoding(model, prompt, loop, max_new_tokens, options)


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
    cache = prompt.cache.in_runs(model.mesh) if options["kernels"] == "gpu" else prompt.cache
    return _decode_chunk.lower(model, cache.segments, loop, 1, **options).compile()


def lower_decode(
    model: Llama, cache: KVCache, kernels: Kernels, on: Callable[[Any], Any], **where: Any
) -> jax.stages.Lowered:
    """The decode loop for a model and a cache of shapes; `on` says where another shape's array would live.

    `where`: what `jax.stages.Traced.lower` takes, for platforms that are not there.
    """
    vector = lambda dtype: on(jax.ShapeDtypeStruct(cache.filled.shape, dtype))  # noqa: E731
    number = lambda dtype: on(jax.ShapeDtypeStruct((), dtype))  # noqa: E731
    key = on(jax.eval_shape(lambda: jax.random.key(0)))
    at: Any = vector(jnp.int32), vector(jnp.bool_), number(jnp.bool_), number(jnp.int32), key, _changing(cache)
    options = {"sampler": Greedy(), "stop_tokens": model.config.stop_tokens, "pad_token": 0, "kernels": kernels}
    return _decode_chunk.trace(model, cache.segments, _Loop(*at), number(jnp.int32), **options).lower(**where)


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
    """Prefill, then decode until every row met a stop token or `max_new_tokens` are made.

    For the next turn pass the result's `cache`, and begin its tokens with the last token of this answer.

    Args:
        model: from `load_model`
        tokens: [B, T] int32, rows right-aligned
        start: [B] int32, the first valid column of each row (default: None, 0)
        sampler: `Greedy` or `Sample(...)` (default: the most likely token)
        stop_tokens: token ids that end a row, () for none (default: None, the checkpoint's own list)
        key: of `jax.random`, which every sampler but `Greedy` needs (default: None)
        **options: `method`, `max_new_tokens`, and the others of `PrefillOptions`

    Raises:
        InputError: for tokens that cannot be read, or a sampler without its key
        FastKVConfigError: for options that cannot work
        CheckpointError: at the first logits that are not finite

    Examples:
        >>> import fastkv_jax as fk
        >>> model, tokenizer = fk.load_model("smollm2-135m", dtype="float32"), fk.load_tokenizer("smollm2-135m")
        >>> tokens, start = fk.pad_batch([tokenizer.encode("One, two, three, four,")])
        >>> made = fk.generate(model, tokens, start, method=fk.FullKV(), max_new_tokens=4)
        >>> tokenizer.decode(made.tokens[0])
        ' five, six,'
    """
    prompt = prefill(model, tokens, start, **options)
    decoding = decode_chunks(
        model,
        prompt,
        max_new_tokens=options["max_new_tokens"],
        sampler=sampler,
        stop_tokens=stop_tokens,
        key=key,
        kernels=options.get("kernels"),
    )
    shape = prompt.logits.shape[0], options["max_new_tokens"]
    out, made = np.full(shape, model.config.pad_token or 0, np.int32), 0
    for chunk, _ in decoding:
        out[:, made : made + chunk.shape[1]] = chunk
        made += chunk.shape[1]
    cache = decoding.cache
    return Generated(jnp.asarray(out), cache.filled + min(made, 1), cache)  # the last token of a row was not fed
