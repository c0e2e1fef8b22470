"""Compressed decode attention: one query per row against frozen prompt entries and the tokens decoded since."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.decode_attention import reference
from kernels_pallas.decode_attention.parts import Slots
from kernels_pallas.decode_attention.quantize import quantize
from kernels_pallas.dispatch import Implementation, kernels

__all__ = ["decode_attention", "quantize"]


def decode_attention(
    q: Float[Array, "B H D"],
    k_prompt: Shaped[Array, "*L B N C D"],
    v_prompt: Shaped[Array, "*L B N C D"],
    positions: Int[Array, "*L B N C"],
    k_new: Float[Array, "*A B K M D"],
    v_new: Float[Array, "*A B K M D"],
    filled: Int[Array, " B"],
    *,
    heads: Int[Array, "*L B 1 C"] | None = None,
    k_scale: Float[Array, "*L B N C"] | None = None,
    v_scale: Float[Array, "*L B N C"] | None = None,
    layer: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Float[Array, "B H D"]:
    """Softmax attention over the prompt slots with positions >= 0 and each row's first `filled` >= 1 new slots.

    N and K may differ (a cache per query head); both divide H. In a flat cache, N = 1, all KV heads share the slots:
    `heads` names the KV head of each, and a query sees the slots of its own head only.
    With `layer` all entries have an axis of layers in front, and it says which is meant, of the prompt's entries and of
    the new ones: kernels then read where the entries are, while a slice of a layer would be copied first.
    A prompt cache of 8 bits (int8, float8_e4m3fn) holds values / scale, as `quantize` makes it, scales in bfloat16.
    Logits and weights in float32, output in q's dtype. `interpret` runs the kernels of a platform on the CPU.
    Raises `ValueError` where the shapes or dtypes do not fit.
    """
    cache_heads, new_heads = k_prompt.shape[-3], k_new.shape[-3]
    if q.shape[1] % cache_heads or q.shape[1] % new_heads:
        raise ValueError(f"decode_attention: {q.shape[1]} query heads over {cache_heads} and {new_heads}")
    if heads is not None and cache_heads != 1:
        raise ValueError(f"decode_attention: heads are for a flat cache, N = 1, not {cache_heads}")
    if {k_prompt.ndim, k_new.ndim} != {4 if layer is None else 5}:
        raise ValueError(f"decode_attention: entries of {k_prompt.ndim} and {k_new.ndim} axes; 5 with layer, else 4")
    eight_bits = k_prompt.dtype.itemsize == 1
    if eight_bits != (k_scale is not None) or eight_bits != (v_scale is not None):
        raise ValueError(f"decode_attention: a cache of 8 bits needs both scales, others none; not {k_prompt.dtype}")
    prompt, new = Slots(k_prompt, v_prompt, positions, heads, k_scale, v_scale), Slots(k_new, v_new)
    if layer is None:
        prompt, new = jax.tree.map(lambda a: a[None], (prompt, new))
        layer = jnp.int32(0), jnp.int32(0)
    if implementation == "reference":
        return reference.decode_attention(q, prompt, new, filled, layer)
    return kernels("decode_attention", implementation).decode_attention(
        q, prompt, new, filled, layer, interpret=interpret
    )
