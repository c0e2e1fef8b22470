"""CriticalKV (arXiv 2502.03805): half of the budget by a score, half by that score times what the value does."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastkv_jax.methods.base import Layer, Method
from fastkv_jax.methods.compression import WindowCompression
from fastkv_jax.methods.snapkv import SnapKV

ROWS = 1024  # values projected at once


@dataclass(frozen=True, kw_only=True)
class CriticalKV(WindowCompression):
    """The best half by `base` (SnapKV if None); the others by (score + 1e-4) times the L1 norm of W_o v.

    The norm is what the entry can move in the layer's output, averaged over the query heads of its group.
    Source: algorithm 1; constants as in kvpress 0.5.4.
    """

    base: Method | None = None
    scores_need_budget = True

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """+inf for the first half, the weighted scores for the rest."""
        base = self.base or SnapKV(window_size=self.window_size, kernel_size=self.kernel_size, pooling=self.pooling)
        scores = layer.protect(base.scores(layer).kv)
        half = jnp.broadcast_to((layer.kept // 2)[:, None], scores.shape[:2])
        return jnp.where(layer.ops.among_best(scores, half), jnp.inf, (scores + 1e-4) * _output_norm(layer))


def _output_norm(layer: Layer):
    """Mean over the group of |W_o v|_1, one query head and a block of rows at a time: [B, K, S]."""
    batch, kv_heads, tokens, dim = layer.v.shape
    by_head = layer.wo.reshape(layer.wo.shape[0], -1, dim).swapaxes(0, 1)  # [H, E, D]
    heads = by_head.shape[0]

    def one_head(wo_and_head):
        wo, head = wo_and_head
        rows = lax.dynamic_index_in_dim(layer.v, head, axis=1, keepdims=False).reshape(-1, dim)
        moved = lambda v: jnp.abs(jnp.einsum("d,ed->e", v, wo, preferred_element_type=jnp.float32)).sum()  # noqa: E731
        return lax.map(moved, rows, batch_size=ROWS)

    norms = lax.map(one_head, (by_head, jnp.arange(heads) // (heads // kv_heads)))  # [H, B * S]
    norms = jnp.moveaxis(norms.reshape(heads, batch, tokens), 0, 1)
    return norms.reshape(batch, kv_heads, -1, tokens).mean(axis=2)
