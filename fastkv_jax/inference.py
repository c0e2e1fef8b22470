"""Prefill and one step of decoding: the public doors, with their checks."""

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from fastkv_jax import rope
from fastkv_jax.adaptive import Adaptive, run_adaptive
from fastkv_jax.attention import Platform
from fastkv_jax.cache import KVCache, SegmentKV
from fastkv_jax.chunks import Chunks, compile_chunks, prefill_in_chunks
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.inputs import Prompt, check_batch, static_tail
from fastkv_jax.methods.base import Method
from fastkv_jax.model import Llama
from fastkv_jax.ops import Kernels, Ops
from fastkv_jax.sharding import check_shares
from fastkv_jax.stages import Prefill, Static, run_jit, run_stages

GROUP = 5  # layers per call where progress is reported
KERNELS: dict[Platform, Kernels] = {"cpu": "reference", "gpu": "gpu", "tpu": "tpu"}
KV_DTYPES = ("int8", "float8_e4m3fn")


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
    cache: KVCache | None = None,
    window_end: Any = 0,
    platform: Platform | None = None,
    kernels: Kernels | None = None,
    kv_dtype: str | None = None,
    prefill_chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Prefill:
    """Read a batch of left-padded prompts: logits of their last tokens, and a cache of what the method keeps.

    tokens          [B, T] int32, rows right-aligned; start [B] the first valid column, 0 if None
    max_new_tokens  room for decoded tokens in the cache; 0 is allowed
    cache           what earlier prompts and answers of the same rows have left, itself unchanged: the tokens go on
                    from there, at their true positions. They see everything in it, all of it stays, and the method
                    chooses among the new tokens alone; `FullKV` keeps a whole question. If nothing had been evicted,
                    the result is that of one long prompt. The last token of an answer is not in the cache yet: begin
                    with it.
    window_end      tokens after the end of the question (a chat template's tail), one number or [B]: the observation
                    window ends before them, and they are always kept
    platform        "cpu", "gpu" or "tpu"; None: where the weights are
    kernels         "tpu", "gpu", or "reference" for plain jax.numpy; None: the platform's own
    kv_dtype        "int8" or "float8_e4m3fn": keep the prompt's entries in 8 bits; None: in the model's dtype
    prefill_chunk   read so many tokens at a time and evict in between, for prompts that do not fit at once; None: all.
                    Another approximation than one pass, but for `FullKV`; see `chunks`
    progress        called with the number of layers done since the last call; the layers then run in several calls

    Compiles once per (method, T, B, max_new_tokens). NumPy arrays and lists are checked here (`InputError`,
    `FastKVConfigError`), traced arrays are not: budgets are looked up by traced length, exact in either case. A method
    that chooses its layer while it runs (ASL) cannot be traced.
    """
    prompt = check_prompt(model, tokens, start, window_end, method, max_new_tokens, cache)
    static = _static(model, method, max_new_tokens, prompt, platform, kernels, kv_dtype)
    past = None if cache is None else cache.folded()
    if prefill_chunk is not None:
        return prefill_in_chunks(_chunks(model, prompt, static, prefill_chunk, cache), progress)
    if isinstance(method, Adaptive):
        if isinstance(prompt.tokens, Tracer):
            raise InputError(f"{type(method).__name__} decides on the host: it cannot run inside another jit")
        return run_adaptive(model, prompt, past, static, report=progress)
    if progress is None:
        return run_jit(model, prompt, past, static=static)
    return run_stages(model, prompt, past, static, group=GROUP, report=progress)


def compile_prefill(
    model: Llama,
    tokens: Any,
    start: Any = None,
    *,
    method: Method,
    max_new_tokens: int,
    cache: KVCache | None = None,
    window_end: Any = 0,
    platform: Platform | None = None,
    kernels: Kernels | None = None,
    kv_dtype: str | None = None,
    prefill_chunk: int | None = None,
    progress: bool = False,
) -> None:
    """Compile what `prefill` with these arguments, with or without `progress`, will run, so that it starts at once."""
    prompt = check_prompt(model, tokens, start, window_end, method, max_new_tokens, cache)
    static = _static(model, method, max_new_tokens, prompt, platform, kernels, kv_dtype)
    past = None if cache is None else cache.folded()
    if prefill_chunk is not None:
        return compile_chunks(_chunks(model, prompt, static, prefill_chunk, cache))

    def every_program(prompt: Prompt, past: KVCache | None) -> Prefill:
        if not isinstance(method, Adaptive):
            return run_stages(model, prompt, past, static, _compile_and_call, GROUP)
        values = chain([1.0], repeat(0.0))  # as if the layer after the first were chosen
        return run_adaptive(model, prompt, past, static, _compile_and_call, disagreement=lambda *_: next(values))

    if progress or isinstance(method, Adaptive):
        jax.eval_shape(every_program, prompt, past)
    else:
        run_jit.lower(model, prompt, past, static=static).compile()


def check_prompt(
    model: Llama,
    tokens: Any,
    start: Any,
    window_end: Any,
    method: Method,
    max_new_tokens: int,
    cache: KVCache | None = None,
) -> Prompt:
    """The arguments of `prefill` as arrays, or `InputError` / `FastKVConfigError`."""
    method.check(model.config.num_layers)
    before = None if cache is None else cache.position
    prompt = check_batch(tokens, start, window_end, model.config, max_new_tokens, before)
    if not isinstance(method, Adaptive):  # whose rows run one by one
        check_shares(prompt.tokens.shape[0], prompt.tokens.shape[1], model.mesh)
    if cache is not None:
        plan = method.plan(np.arange(1, 2), model.config.num_layers)
        if any(segment.renumbered for segment in plan):
            raise InputError(f"{type(method).__name__} numbers its rows anew; it cannot go on from a cache")
    return prompt


def check_in_chunks(method: Method, num_layers: int) -> None:
    """Raise `InputError` for a method that cannot read a prompt in chunks: one that looks at all of it, or twice."""
    name = type(method).__name__
    if isinstance(method, Adaptive):
        raise InputError(f"{name} looks at whole prompts: it cannot read chunks")
    runs = method.plan(np.arange(1, 2), num_layers)
    if any(run.renumbered or (i and not run.first) for i, run in enumerate(runs)):
        raise InputError(f"{name} reads the prompt twice: it cannot read chunks")


def _chunks(model: Llama, prompt: Prompt, static: Static, size: int, cache: KVCache | None) -> Chunks:
    if not isinstance(size, int) or size < 1:
        raise InputError(f"prefill_chunk must be an integer >= 1, got {size!r}")
    if isinstance(prompt.tokens, Tracer) or isinstance(prompt.start, Tracer):
        raise InputError("prefill_chunk loops on the host: it cannot run inside another jit")
    if cache is not None:
        raise InputError("prefill_chunk reads prompts from their beginning; it cannot go on from a cache")
    check_in_chunks(static.method, model.config.num_layers)
    return Chunks(model, prompt, static, size)


def _static(model, method, max_new_tokens, prompt: Prompt, platform, kernels, kv_dtype) -> Static:
    platform = platform or platform_of(model)
    if kv_dtype not in (None, *KV_DTYPES):
        raise FastKVConfigError(f"kv_dtype must be None or one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    tail = static_tail(prompt.window_end)
    return Static(method, max_new_tokens, tail, platform, kernels or KERNELS[platform], kv_dtype)


def platform_of(model: Llama) -> Platform:
    """Where the model's weights live; where jax would put them if they are traced."""
    weights = model.norm[...]
    name = jax.default_backend() if isinstance(weights, Tracer) else next(iter(weights.devices())).platform
    return "gpu" if name in ("gpu", "cuda", "rocm") else "tpu" if name == "tpu" else "cpu"


def _compile_and_call(program: Any, *args: Any, **static: Any) -> Any:
    """Compile a program for arguments of which only the shapes are known, and pass on the shapes of its results."""

    def shape(x: Any) -> jax.ShapeDtypeStruct:  # as jit takes it: NumPy's int64 is int32 there
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

    shapes = [a if isinstance(a, Llama) else jax.tree.map(shape, a) for a in args]
    program.lower(*shapes, **static).compile()
    return program(*args, **static)


# ---------------------------------------------------------------------------------------------------------------------
# Decode
# ---------------------------------------------------------------------------------------------------------------------


def decode_step(
    model: Llama, token: Any, cache: KVCache, *, kernels: Kernels | None = None
) -> tuple[Float[Array, "B V"], KVCache]:
    """Feed one token [B] per row: the logits that follow it, and the cache with its entries. The cache is donated.

    Raises `InputError` when the cache has no room left, never a clamped write (a traced cache is not checked).
    """
    if not isinstance(cache.used, Tracer) and int(cache.used) >= cache.max_new_tokens:
        slots = max(segment.k.shape[3] for segment in cache.segments) + cache.max_new_tokens
        raise InputError(f"cache is full ({slots}/{slots}): it has room for max_new_tokens={cache.max_new_tokens}")
    kernels = kernels or KERNELS[platform_of(model)]
    return _decode_jit(model, jnp.asarray(token, jnp.int32), cache, kernels=kernels)


def decode(
    model: Llama,
    token: Int[Array, " B"],
    cache: KVCache,
    live: Bool[Array, " B"] | None = None,
    *,
    kernels: Kernels = "reference",
) -> tuple[Float[Array, "B V"], KVCache]:
    """One step without checks, jit or donation, to be a part of a larger program.

    Rows that are not `live` have ended: what they are fed does not count.
    """
    x = model.embed(token[:, None])
    cos, sin = rope.angles(model.config.rope, model.config.head_dim, cache.position[:, None])

    def layer(segment: SegmentKV, first: int, carry, index):
        x, k_new, v_new = carry
        block = model.layer(index, in_place=kernels == "gpu" and model.mesh is None)
        q, k, v = block.qkv(x, cos, sin)
        k_new, v_new = (
            lax.dynamic_update_slice(buffer, a[None], (index, 0, 0, cache.used, 0))
            for buffer, a in ((k_new, k), (v_new, v))
        )
        frozen = segment.k, segment.v, segment.positions
        extras = segment.heads, segment.k_scale, segment.v_scale, (index - first, index)
        out = ops.decode_attention(q[:, :, 0], *frozen, k_new, v_new, cache.filled + 1, *extras)
        return (block.output(x, out[:, :, None]), k_new, v_new), None

    ops = Ops(kernels, model.mesh)
    carry = x, cache.k_new, cache.v_new
    for segment, first, stop in zip(cache.segments, cache.edges, cache.edges[1:], strict=False):
        carry, _ = lax.scan(partial(layer, segment, first), carry, jnp.arange(first, stop))
    x, k_new, v_new = carry
    step = jnp.ones_like(cache.filled) if live is None else live.astype(jnp.int32)
    cache = dataclasses.replace(
        cache,
        k_new=k_new,
        v_new=v_new,
        used=cache.used + 1,
        filled=cache.filled + step,
        position=cache.position + step,
    )
    return model.logits(x[:, 0]), cache


_decode_jit = jax.jit(decode, donate_argnames=("cache",), static_argnames=("kernels",))
