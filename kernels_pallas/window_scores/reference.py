"""The specification of `window_scores` in plain jax.numpy."""

import jax
import jax.numpy as jnp
from jax import lax


def window_scores(q, k, start, stop, *, kernel_size, pooling):
    batch, heads, window, dim = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    columns = jnp.arange(tokens)[None]
    rows = stop[:, None] - window + jnp.arange(window)[None]  # [B, W]: where each query sits
    seen = (columns[None] <= rows[..., None]) & (columns[None] >= start[:, None, None])  # [B, W, T]

    grouped = q.reshape(batch, kv_heads, heads // kv_heads, window, dim)
    logits = jnp.einsum("bkgwd,bktd->bkgwt", grouped, k, preferred_element_type=jnp.float32)
    seen = seen[:, None, None]
    weights = jax.nn.softmax(logits * dim**-0.5, axis=-1, where=seen)  # a query on padding sees nothing: all 0

    candidates = (columns >= start[:, None]) & (columns < stop[:, None] - window)  # [B, T]
    summed = jnp.where(candidates[:, None, None], weights.sum(axis=3), 0.0)  # [B, K, G, T]
    return pool(summed, kernel_size, pooling).sum(axis=2)


def pool(x, kernel_size, pooling):
    """Stride-1 pooling along the last axis of x >= 0, same length; an average counts the zero padding at the edges."""
    sides = [(0, 0)] * (x.ndim - 1) + [(kernel_size // 2, kernel_size // 2)]
    box = (1,) * (x.ndim - 1) + (kernel_size,)
    if pooling == "max":
        return lax.reduce_window(x, 0.0, lax.max, box, (1,) * x.ndim, sides)
    return lax.reduce_window(x, 0.0, lax.add, box, (1,) * x.ndim, sides) / kernel_size
