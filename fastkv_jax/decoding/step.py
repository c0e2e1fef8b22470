"""One step of decoding: the public door with its check, and the step as a part of a larger program."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.cache.segment import SegmentKV
from fastkv_jax.errors import InputError
from fastkv_jax.model import rope
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.ops import Ops
from fastkv_jax.model.platforms import KERNELS, Kernels, full_precision
from kernels_pallas import Slots


def decode_step(
    model: Llama, token: Any, cache: KVCache, *, kernels: Kernels | None = None
) -> tuple[Float[Array, "B V"], KVCache]:
    """Feed one token [B] per row: the logits that follow it, and the cache with its entries. The cache is donated.

    Args:
        model: from `load_model`
        token: [B] int32
        cache: of `prefill`, or of the step before
        kernels: "tpu", "gpu", or "reference" for plain jax.numpy (default: None, the platform's own)

    Raises:
        InputError: when the cache has no room left; never a clamped write (a traced cache is not checked)
    """
    if not isinstance(cache.used, Tracer) and int(cache.used) >= cache.max_new_tokens:
        slots = max(segment.k.shape[3] for segment in cache.segments) + cache.max_new_tokens
        raise InputError(f"cache is full ({slots}/{slots}): it has room for max_new_tokens={cache.max_new_tokens}")
    kernels = kernels or KERNELS[model.platform]
    cache = cache.in_runs(model.mesh) if kernels == "gpu" else cache
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

    Rows that are not `live` have ended: what they are fed does not count, and without a live row no slot is used up.
    """
    with full_precision("gpu" if kernels == "gpu" else model.platform, model.dtype):
        return _decode(model, token, cache, live, kernels)


def _decode(model: Llama, token, cache: KVCache, live, kernels: Kernels) -> tuple[Float[Array, "B V"], KVCache]:
    x = model.embed(token[:, None])
    turn = rope.angles(model.config.rope, model.config.head_dim, cache.position)

    filled = cache.filled + 1

    def layer(segment: SegmentKV, first: int, index, carry):
        x, k_new, v_new = carry
        block = model.layer(index, in_place=kernels == "gpu" and model.mesh is None)
        q, k, v = (a[:, :, 0] for a in block.unrotated(x))
        q, k_new, v_new = ops.append(q, k, v, turn, (k_new, v_new), cache.used, index)
        new, place = Slots(k_new, v_new), (index - first, index)
        out = ops.decode_attention(q, segment.slots(), new, filled, place)
        return block.output(x, out[:, :, None]), k_new, v_new

    ops = Ops(kernels, model.mesh)
    carry = x, cache.k_new, cache.v_new
    for segment, first, stop in zip(cache.segments, cache.edges, cache.edges[1:], strict=False):
        carry = lax.fori_loop(first, stop, partial(layer, segment, first), carry)
    x, k_new, v_new = carry
    step = jnp.ones_like(cache.filled) if live is None else live.astype(jnp.int32)
    cache = dataclasses.replace(
        cache,
        k_new=k_new,
        v_new=v_new,
        used=cache.used + step.max(),
        filled=cache.filled + step,
        position=cache.position + step,
    )
    return model.logits(x[:, 0]), cache


_decode_jit = jax.jit(decode, donate_argnames=("cache",), static_argnames=("kernels",))
