"""Compressed decode attention: one query per row against frozen prompt entries and the tokens decoded since."""

from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.decode_attention import reference
from kernels_pallas.decode_attention.quantize import quantize
from kernels_pallas.dispatch import Implementation, kernels

__all__ = ["decode_attention", "quantize"]


def decode_attention(
    q: Float[Array, "B H D"],
    k_prompt: Shaped[Array, "B N C D"],
    v_prompt: Shaped[Array, "B N C D"],
    positions: Int[Array, "B N C"],
    k_new: Float[Array, "B K M D"],
    v_new: Float[Array, "B K M D"],
    filled: Int[Array, " B"],
    *,
    heads: Int[Array, "B 1 C"] | None = None,
    k_scale: Float[Array, "B N C"] | None = None,
    v_scale: Float[Array, "B N C"] | None = None,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Float[Array, "B H D"]:
    """Softmax attention over the prompt slots with positions >= 0 and each row's first `filled` >= 1 new slots.

    N and K may differ (a cache per query head); both divide H. In a flat cache, N = 1, all KV heads share the slots:
    `heads` names the KV head of each, and a query sees the slots of its own head only.
    A prompt cache of 8 bits (int8, float8_e4m3fn) holds values / scale, as `quantize` makes it, scales in bfloat16.
    Logits and weights in float32, output in q's dtype. `interpret` runs the kernels of a platform on the CPU.
    Raises `ValueError` where the shapes or dtypes do not fit.
    """
    if q.shape[1] % k_prompt.shape[1] or q.shape[1] % k_new.shape[1]:
        raise ValueError(f"decode_attention: {q.shape[1]} query heads over {k_prompt.shape[1]} and {k_new.shape[1]}")
    if heads is not None and k_prompt.shape[1] != 1:
        raise ValueError(f"decode_attention: heads are for a flat cache, N = 1, not {k_prompt.shape[1]}")
    eight_bits = k_prompt.dtype.itemsize == 1
    if eight_bits != (k_scale is not None) or eight_bits != (v_scale is not None):
        raise ValueError(f"decode_attention: a cache of 8 bits needs both scales, others none; not {k_prompt.dtype}")
    arguments = (q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads, k_scale, v_scale)
    if implementation == "reference":
        return reference.decode_attention(*arguments)
    return kernels("decode_attention", implementation).decode_attention(*arguments, interpret=interpret)
