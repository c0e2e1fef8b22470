"""How much attention each entry receives from many queries, without ever holding the T x T map."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fastkv_jax.methods.base import Layer

QUERY_BLOCK = 128


def attention_sums(
    layer: Layer,
    weights: Float[Array, "B S"],
    sees: Callable[[Int[Array, "1 Q 1"], Int[Array, "1 1 S"]], Bool[Array, "1 Q S"]] = lambda query, key: query >= key,
) -> Float[Array, "B H S"]:
    """sum over queries of weight * softmax(q k^T / sqrt(D)), float32; queries of weight 0 at the front cost nothing.

    `sees(query columns, key columns)` is the mask: causal, unless the published code has another one.
    """
    q, k, start = layer.q, layer.k, layer.start
    batch, heads, tokens, dim = q.shape
    pad = -tokens % QUERY_BLOCK
    q = jnp.pad(q, ((0, 0), (0, 0), (pad, 0), (0, 0))).reshape(batch, k.shape[1], -1, tokens + pad, dim)
    weights = jnp.pad(weights, ((0, 0), (pad, 0)))
    keys = jnp.arange(tokens)[None, None]
    used = jnp.argmax((weights > 0).any(axis=0)) // QUERY_BLOCK  # the first block with a query that counts

    def one_block(block, sums):
        first = block * QUERY_BLOCK
        queries = lax.dynamic_slice_in_dim(q, first, QUERY_BLOCK, axis=3)
        weight = lax.dynamic_slice_in_dim(weights, first, QUERY_BLOCK, axis=1)
        columns = first - pad + jnp.arange(QUERY_BLOCK)[None, :, None]
        seen = sees(columns, keys) & (keys >= start[:, None, None])  # [B, Q, S]

        def one_head(queries_and_keys):
            queries, k = queries_and_keys  # [B, G, Q, D], [B, S, D]
            logits = jnp.einsum("bgqd,btd->bgqt", queries, k, preferred_element_type=jnp.float32) * dim**-0.5
            attention = jax.nn.softmax(logits, axis=-1, where=seen[:, None])
            return jnp.einsum("bgqt,bq->bgt", attention, weight)

        return sums + lax.map(one_head, (jnp.moveaxis(queries, 1, 0), jnp.moveaxis(k, 1, 0)))

    shape = (k.shape[1], batch, heads // k.shape[1], tokens)
    sums = lax.fori_loop(used, (tokens + pad) // QUERY_BLOCK, one_block, jnp.zeros(shape, jnp.float32))
    return jnp.moveaxis(sums, 0, 1).reshape(batch, heads, tokens)
