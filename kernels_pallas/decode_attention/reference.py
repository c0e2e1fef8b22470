"""The specification of `decode_attention` in plain jax.numpy."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.decode_attention.parts import Slots, mixed_in


def decode_attention(q, prompt: Slots, decoded: Slots, filled, layer):
    k_prompt, v_prompt, positions, heads, k_scale, v_scale = _of_layer(prompt, layer[0])
    k_new, v_new, *_ = _of_layer(decoded, layer[1])
    batch, query_heads, _ = q.shape
    there = (positions >= 0)[:, :, None]  # [B, N, 1, C]
    if heads is not None:
        owner = jnp.arange(query_heads) // (query_heads // k_new.shape[1])
        there = there & (heads[:, :, None] == owner[None, None, :, None])
    old = jnp.where(there, _logits(q, k_prompt, k_scale), -jnp.inf)  # [B, N, H/N, C]
    slots = jnp.arange(k_new.shape[2])[None]
    new = jnp.where((slots < filled[:, None])[:, None, None], _logits(q, k_new, None), -jnp.inf)  # [B, K, H/K, M]
    flat = jnp.concatenate([old.reshape(batch, query_heads, -1), new.reshape(batch, query_heads, -1)], axis=-1)
    weights = jax.nn.softmax(flat, axis=-1)
    capacity = k_prompt.shape[2]
    old, new = weights[..., :capacity], weights[..., capacity:]
    of_prompt = _mix(old, v_prompt, v_scale, mixed_in(q.dtype, prompt))
    return (of_prompt + _mix(new, v_new, None, q.dtype)).astype(q.dtype)


def _of_layer(slots: Slots, layer) -> Slots:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False), slots)


def _logits(q, k, scale):
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    products = jnp.einsum("bngd,bncd->bngc", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32)
    scaled = products if scale is None else products * scale.astype(jnp.float32)[:, :, None]
    return scaled * q.shape[-1] ** -0.5


def _mix(weights, v, scale, dtype):
    batch, query_heads, slots = weights.shape
    grouped = weights.reshape(batch, v.shape[1], query_heads // v.shape[1], slots)
    grouped = (grouped if scale is None else grouped * scale.astype(jnp.float32)[:, :, None]).astype(dtype)
    mixed = jnp.einsum("bngc,bncd->bngd", grouped, v.astype(dtype), preferred_element_type=jnp.float32)
    return mixed.reshape(batch, query_heads, -1)
