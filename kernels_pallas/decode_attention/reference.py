"""The specification of `decode_attention` in plain jax.numpy."""

import jax
import jax.numpy as jnp


def decode_attention(q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads):
    batch, query_heads, _ = q.shape
    there = (positions >= 0)[:, :, None]  # [B, N, 1, C]
    if heads is not None:
        owner = jnp.arange(query_heads) // (query_heads // k_new.shape[1])
        there = there & (heads[:, :, None] == owner[:, None])
    old = jnp.where(there, _logits(q, k_prompt), -jnp.inf)  # [B, N, H/N, C]
    slots = jnp.arange(k_new.shape[2])
    new = jnp.where((slots < filled[:, None])[:, None, None], _logits(q, k_new), -jnp.inf)  # [B, K, H/K, M]
    flat = jnp.concatenate([old.reshape(batch, query_heads, -1), new.reshape(batch, query_heads, -1)], axis=-1)
    weights = jax.nn.softmax(flat, axis=-1)
    capacity = k_prompt.shape[2]
    out = _mix(weights[..., :capacity], v_prompt) + _mix(weights[..., capacity:], v_new)
    return out.astype(q.dtype)


def _logits(q, k):
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return jnp.einsum("bngd,bncd->bngc", grouped, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _mix(weights, v):
    grouped = weights.reshape(weights.shape[0], v.shape[1], -1, weights.shape[-1]).astype(v.dtype)
    mixed = jnp.einsum("bngc,bncd->bngd", grouped, v, preferred_element_type=jnp.float32)
    return mixed.reshape(weights.shape[0], weights.shape[1], -1)
