"""Compressed decode attention: one query per row against frozen prompt entries and the tokens decoded since."""

from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention import reference


def decode_attention(
    q: Float[Array, "B H D"],
    k_prompt: Float[Array, "B N C D"],
    v_prompt: Float[Array, "B N C D"],
    positions: Int[Array, "B N C"],
    k_new: Float[Array, "B K M D"],
    v_new: Float[Array, "B K M D"],
    filled: Int[Array, " B"],
    *,
    heads: Int[Array, "B 1 C"] | None = None,
) -> Float[Array, "B H D"]:
    """Softmax attention over the prompt slots with positions >= 0 and each row's first `filled` >= 1 new slots.

    N and K may differ (a cache per query head); both divide H. In a flat cache, N = 1, all KV heads share the slots:
    `heads` names the KV head of each, and a query sees the slots of its own head only.
    Logits and weights in float32, output in q's dtype. Raises `ValueError` where the shapes do not fit.
    """
    if q.shape[1] % k_prompt.shape[1] or q.shape[1] % k_new.shape[1]:
        raise ValueError(f"decode_attention: {q.shape[1]} query heads over {k_prompt.shape[1]} and {k_new.shape[1]}")
    if heads is not None and k_prompt.shape[1] != 1:
        raise ValueError(f"decode_attention: heads are for a flat cache, N = 1, not {k_prompt.shape[1]}")
    return reference.decode_attention(q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads)
