"""The public door to a prefill, with its checks: `prefill` runs what `prepare` describes."""

from collections.abc import Callable
from typing import Any, Protocol, Required, TypedDict, Unpack, runtime_checkable

import numpy as np
from jax.core import Tracer

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.methods.base import Method
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.platforms import KERNELS, Kernels, Platform
from fastkv_jax.model.sharding import check_shares
from fastkv_jax.prefilling.adaptive import Adaptive, HostDecided
from fastkv_jax.prefilling.chunked import Chunks
from fastkv_jax.prefilling.layers import Prefill, Static
from fastkv_jax.prefilling.passes import Whole
from fastkv_jax.prefilling.prompt import Prompt, check_batch, static_tail

KV_DTYPES = ("int8", "float8_e4m3fn")


class PrefillOptions(TypedDict, total=False):
    """How prompts are read; the same for `prefill`, `generate`, `stream` and `prepare`.

    Attributes:
        method: what is propagated and kept: one of `fk.METHODS`, or your own
        max_new_tokens: room for decoded tokens in the cache; 0 is allowed
        cache: what earlier prompts and answers of the same rows have left, itself unchanged: the tokens go on from
            there, at their true positions. They see everything in it, all of it stays, and the method chooses among
            the new tokens alone; `FullKV` keeps a whole question. If nothing had been evicted, the result is that of
            one long prompt. The last token of an answer is not in the cache yet: begin with it. (default: None,
            nothing stands before them)
        window_end: tokens after the end of the question (a chat template's tail), one number or [B]: the observation
            window ends before them, and they are always kept (default: 0)
        platform: "cpu", "gpu" or "tpu" (default: None, where the weights are)
        kernels: "tpu", "gpu", or "reference" for plain jax.numpy (default: None, the platform's own)
        kv_dtype: "int8" or "float8_e4m3fn": keep the prompt's entries in 8 bits (default: None, the model's dtype)
        prefill_chunk: read so many tokens at a time and evict in between, for prompts that do not fit at once. Another
            approximation than one pass, but for `FullKV`; see `prefilling/chunked` (default: None, all at once)
    """

    method: Required[Method]
    max_new_tokens: Required[int]
    cache: KVCache | None
    window_end: Any
    platform: Platform | None
    kernels: Kernels | None
    kv_dtype: str | None
    prefill_chunk: int | None


@runtime_checkable
class Prepared(Protocol):
    """A prefill whose arguments have been checked."""

    @property
    def prompt(self) -> Prompt:
        """The prompts as arrays."""
        ...

    @property
    def static(self) -> Static:
        """What its programs are compiled for."""
        ...

    def compile(self, report: Callable[[int], object] | None = None) -> None:
        """Compile what `run` with this argument will call, so that it starts at once."""
        ...

    def run(self, report: Callable[[int], object] | None = None) -> Prefill:
        """Read the prompts; `report` is called with the number of layers done since the last call."""
        ...


def prefill(
    model: Llama,
    tokens: Any,
    start: Any = None,
    *,
    progress: Callable[[int], object] | None = None,
    **options: Unpack[PrefillOptions],
) -> Prefill:
    """Read a batch of left-padded prompts: logits of their last tokens, and a cache of what the method keeps.

    Compiles once per (method, T, B, max_new_tokens). NumPy arrays and lists are checked here, traced arrays are not:
    budgets are looked up by traced length, exact in either case. A method that chooses its layer while it runs (ASL)
    cannot be traced.

    Args:
        model: from `load_model`
        tokens: [B, T] int32, rows right-aligned
        start: [B] int32, the first valid column of each row (default: None, 0)
        progress: called with the number of layers done since the last call; the layers then run in several calls
            (default: None, in as few as there can be)
        **options: `method`, `max_new_tokens`, and the others of `PrefillOptions`

    Raises:
        InputError: for tokens that cannot be read
        FastKVConfigError: for options that cannot work

    Examples:
        >>> import fastkv_jax as fk
        >>> model, tokenizer = fk.load_model("smollm2-135m", dtype="float32"), fk.load_tokenizer("smollm2-135m")
        >>> tokens, start = fk.pad_batch([tokenizer.encode("The boats go out at dawn. " * 10)])
        >>> method = fk.FastKV(tsp_layer=14, tsp_rate=0.4, retention_rate=0.2)
        >>> read = fk.prefill(model, tokens, start, method=method, max_new_tokens=8)
        >>> read.logits.shape, int(read.cache.position[0])
        ((1, 49152), 71)
        >>> [int((read.cache.layer(i).positions >= 0).sum()) for i in (0, 29)]  # 14 entries for each of three heads
        [42, 42]
    """
    return prepare(model, tokens, start, **options).run(progress)


def prepare(
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
) -> Prepared:
    """What `prefill` with these arguments will do, checked but not begun: `.compile()` it, or `.run()` it.

    tokens [B, T] int32, start [B]; the options are `PrefillOptions`. Raises `InputError` and `FastKVConfigError`.
    """
    prompt = _checked(model, tokens, start, window_end, method, max_new_tokens, cache)
    platform = platform or model.platform
    if kv_dtype not in (None, *KV_DTYPES):
        raise FastKVConfigError(f"kv_dtype must be None or one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    tail = static_tail(prompt.window_end)
    static = Static(method, max_new_tokens, tail, platform, kernels or KERNELS[platform], kv_dtype)
    if prefill_chunk is not None:
        return _chunks(model, prompt, static, prefill_chunk, cache)
    past = None if cache is None else cache.folded()
    if not isinstance(method, Adaptive):
        return Whole(model, prompt, past, static)
    if isinstance(prompt.tokens, Tracer):
        raise InputError(f"{type(method).__name__} decides on the host: it cannot run inside another jit")
    return HostDecided(model, prompt, past, static)


def _checked(
    model: Llama, tokens: Any, start: Any, window_end: Any, method: Method, max_new_tokens: int, cache: KVCache | None
) -> Prompt:
    """The prompts as arrays, or `InputError` / `FastKVConfigError`."""
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
