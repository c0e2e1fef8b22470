"""The specification of `decode_attention` in plain jax.numpy."""

import jax
import jax.numpy as jnp


def decode_attention(q, k_prompt, v_prompt, positions, k_new, v_new, used):
    old = jnp.where((positions >= 0)[:, :, None], _logits(q, k_prompt), -jnp.inf)  # [B, N, H/N, C]
    new = jnp.where(jnp.arange(k_new.shape[2]) < used, _logits(q, k_new), -jnp.inf)  # [B, K, H/K, M]
    batch, heads, _ = q.shape
    flat = jnp.concatenate([old.reshape(batch, heads, -1), new.reshape(batch, heads, -1)], axis=-1)
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
