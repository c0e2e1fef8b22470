"""Compressed decode attention: one query per row against frozen prompt entries and the tokens decoded since."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention import reference
from kernels_pallas.decode_attention.parts import Slots
from kernels_pallas.decode_attention.quantize import quantize
from kernels_pallas.dispatch import Implementation, kernels

__all__ = ["Slots", "decode_attention", "quantize"]


def decode_attention(
    q: Float[Array, "B H D"],
    prompt: Slots,
    new: Slots,
    filled: Int[Array, " B"],
    layer: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
    *,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Float[Array, "B H D"]:
    """Softmax attention over the prompt's slots with positions >= 0 and each row's first `filled` >= 1 new slots.

    prompt   of N cache heads, new of K KV heads, which may differ (a cache per query head); both divide H. In a flat
             cache, N = 1, all KV heads share the slots: `heads` names the KV head of each, and a query sees its own.
             In a cache of 8 bits (int8, float8_e4m3fn) entries are values / scale, as `quantize` makes them.
    layer    all entries have an axis of layers in front, and this one is meant, of the prompt's and of the new: kernels
             then read where the entries are, while a slice of a layer would be copied first (default: no such axis)

    Logits and weights in float32, output in q's dtype. `interpret` runs the kernels of a platform on the CPU.
    Raises `ValueError` where the shapes or dtypes do not fit.
    """
    cache_heads, new_heads, axes = prompt.k.shape[-3], new.k.shape[-3], (prompt.k.ndim, new.k.ndim)
    if q.shape[1] % cache_heads or q.shape[1] % new_heads:
        raise ValueError(f"decode_attention: {q.shape[1]} query heads over {cache_heads} and {new_heads}")
    if prompt.heads is not None and cache_heads != 1:
        raise ValueError(f"decode_attention: heads are for a flat cache, N = 1, not {cache_heads}")
    if set(axes) != {4 if layer is None else 5}:
        raise ValueError(f"decode_attention: entries of {axes[0]} and {axes[1]} axes; 5 with layer, else 4")
    eight_bits = prompt.k.dtype.itemsize == 1
    if eight_bits != (prompt.k_scale is not None) or eight_bits != (prompt.v_scale is not None):
        raise ValueError(f"decode_attention: a cache of 8 bits needs both scales, others none; not {prompt.k.dtype}")
    if layer is None:
        prompt, new = jax.tree.map(lambda a: a[None], (prompt, new))
        layer = jnp.int32(0), jnp.int32(0)
    if implementation == "reference":
        return reference.decode_attention(q, prompt, new, filled, layer)
    return kernels("decode_attention", implementation).decode_attention(
        q, prompt, new, filled, layer, interpret=interpret
    )
