"""Causal attention over right-aligned rows, by explicit platform: blocked (CPU), cuDNN (GPU), splash (TPU).

Not a kernel of ours: the two accelerators' own flash attention, and for the CPU a form that never holds the T x T map.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

Platform = Literal["cpu", "gpu", "tpu"]

_QUERY_BLOCK, _KEY_BLOCK = 256, 512  # 768 x 512 logits of a group of three stay in a core's cache (CPU)
_LANES = 128
_AFTER_BLOCK = 128  # queries at once against a past


def attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    start: Int[Array, " B"],
    *,
    platform: Platform,
    mesh: Mesh | None = None,
) -> Float[Array, "B H T D"]:
    """softmax(q k^T / sqrt(D)) v, each query seeing the keys from `start` to itself; rows before `start` are noise.

    With a mesh the heads are spread over its axis "model", each device running its own.
    """
    local = {"cpu": _blocked, "gpu": _cudnn, "tpu": _splash}[platform]
    if mesh is None:
        return local(q, k, v, start)
    heads = PartitionSpec(None, "model")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(heads, heads, heads, PartitionSpec()), out_specs=heads, check_vma=False
    )(q, k, v, start)


def _blocked(q, k, v, start):
    """Online softmax over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867), queries a block at a time.

    The group is folded into the rows of one product per KV head. Blocks right of the diagonal or left of every row's
    start are never visited, so padding to a bucket costs nothing here.
    """
    tokens, dim = q.shape[2], q.shape[3]
    if tokens <= _KEY_BLOCK:
        query_block = key_block = tokens
    else:
        query_block, key_block = _QUERY_BLOCK, _KEY_BLOCK
    pad = -tokens % key_block  # more left padding changes nothing
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (pad, 0), (0, 0))) for x in (q, k, v))
    start = start + pad

    batch, kv_heads, length, _ = k.shape
    group = q.shape[1] // kv_heads
    q = (q * jnp.asarray(dim**-0.5, q.dtype)).reshape(batch, kv_heads, group, length, dim)
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # the extra column sums the weights
    first_key_block, last_padded_block = start.min() // key_block, -(-start.max() // key_block)

    def query_rows(index):
        first = index * query_block
        rows = first + jnp.arange(query_block)
        queries = lax.dynamic_slice_in_dim(q, first, query_block, axis=3)
        queries = queries.reshape(batch, kv_heads, group * query_block, dim)

        def visit(block, carry, edge):
            highest, summed = carry
            keys = lax.dynamic_slice_in_dim(k, block * key_block, key_block, axis=2)
            values = lax.dynamic_slice_in_dim(v, block * key_block, key_block, axis=2)
            logits = jnp.einsum("bkrd,bktd->bkrt", queries, keys, preferred_element_type=jnp.float32)
            if edge:
                columns = block * key_block + jnp.arange(key_block)
                seen = (columns <= rows[:, None]) & (columns >= start[:, None, None])  # [B, query, key]
                logits = logits.reshape(batch, kv_heads, group, query_block, key_block)
                logits = jnp.where(seen[:, None, None], logits, -1e30).reshape(batch, kv_heads, -1, key_block)
            new_highest = jnp.maximum(highest, logits.max(axis=-1))
            weights = jnp.exp(logits - new_highest[..., None]).astype(v.dtype)
            part = jnp.einsum("bkrt,bktd->bkrd", weights, values, preferred_element_type=jnp.float32)
            return new_highest, summed * jnp.exp(highest - new_highest)[..., None] + part

        shape = (batch, kv_heads, group * query_block)
        carry = jnp.full(shape, -1e30), jnp.zeros((*shape, dim + 1))
        # Only blocks at an edge need the mask: those with padding in them, and those on the diagonal.
        end = (first + query_block - 1) // key_block + 1
        inner = jnp.minimum(last_padded_block, end)
        diagonal = jnp.maximum(inner, first // key_block)
        carry = lax.fori_loop(first_key_block, inner, partial(visit, edge=True), carry)
        carry = lax.fori_loop(inner, diagonal, partial(visit, edge=False), carry)
        _, summed = lax.fori_loop(diagonal, end, partial(visit, edge=True), carry)
        out = summed[..., :dim] / jnp.maximum(summed[..., dim:], 1e-30)
        return out.reshape(batch, kv_heads, group, query_block, dim).astype(k.dtype)

    out = lax.map(query_rows, jnp.arange(length // query_block))  # [blocks, B, K, G, query, D]
    out = jnp.moveaxis(out, 0, 3).reshape(batch, -1, length, dim)
    return out[:, :, pad:]


def attention_after(
    past: tuple[Float[Array, "B N C D"], Float[Array, "B N C D"], Bool[Array, "B N C"], Int[Array, "B 1 C"] | None],
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    start: Int[Array, " B"],
) -> Float[Array, "B H T D"]:
    """`attention` of rows that also see all of the past: its keys, values, which slots count, and whose they are.

    A block of queries at a time; written for short rows after a long past.
    """
    past_k, past_v, there, owner = past
    batch, heads, tokens, dim = q.shape
    pad = -tokens % _AFTER_BLOCK
    blocks = jnp.pad(q, ((0, 0), (0, 0), (pad, 0), (0, 0))).reshape(batch, heads, -1, _AFTER_BLOCK, dim)
    there = there[:, :, None]  # [B, N, 1, C]
    if owner is not None:
        there = there & (owner[:, :, None] == (jnp.arange(heads) // (heads // k.shape[1]))[:, None])
    there = jnp.broadcast_to(there, (batch, there.shape[1], heads // past_k.shape[1], there.shape[-1]))
    there = there.reshape(batch, heads, 1, -1)
    columns = jnp.arange(tokens)

    def product(spec, a, b):  # b has fewer heads: fold the group of each into a's axes
        grouped = a.reshape(batch, b.shape[1], -1, *a.shape[2:])
        out = jnp.einsum(spec, grouped, b, preferred_element_type=jnp.float32)
        return out.reshape(batch, heads, *out.shape[3:])

    def one_block(block_and_index):
        block, index = block_and_index
        rows = index * _AFTER_BLOCK - pad + jnp.arange(_AFTER_BLOCK)
        seen = (columns <= rows[:, None]) & (columns >= start[:, None, None])  # [B, Q, T]
        old = jnp.where(there, product("bngqd,bncd->bngqc", block, past_k) * dim**-0.5, -1e30)
        new = jnp.where(seen[:, None], product("bngqd,bncd->bngqc", block, k) * dim**-0.5, -1e30)
        weights = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1).astype(v.dtype)
        mixed = [
            product("bngqc,bncd->bngqd", part, values)
            for part, values in ((weights[..., : old.shape[-1]], past_v), (weights[..., old.shape[-1] :], v))
        ]
        return (mixed[0] + mixed[1]).astype(v.dtype)

    out = lax.map(one_block, (jnp.moveaxis(blocks, 2, 0), jnp.arange(blocks.shape[2])))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, -1, dim)[:, :, pad:]


def _cudnn(q, k, v, start):
    """cuDNN's flash attention. It masks padding only on the right, so rows are rolled to the left and back."""
    tokens = q.shape[2]
    columns = jnp.arange(tokens)
    to_left = (columns + start[:, None]) % tokens
    to_right = (columns - start[:, None]) % tokens
    q, k, v = (jnp.take_along_axis(x.swapaxes(1, 2), to_left[..., None, None], axis=1) for x in (q, k, v))
    lengths = (tokens - start).astype(jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return jnp.take_along_axis(out, to_right[..., None, None], axis=1).swapaxes(1, 2)


def _splash(q, k, v, start):
    """JAX's splash attention for TPU; padding is another segment than the prompt. Blocks must divide the length."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    tokens, dim = q.shape[2], q.shape[3]
    pad_rows, pad_dim = -tokens % _LANES, -dim % _LANES
    widths = ((0, 0), (0, 0), (pad_rows, 0), (0, pad_dim))
    q = q * jnp.asarray(dim**-0.5, q.dtype)
    q, k, v = (jnp.pad(x, widths) for x in (q, k, v))
    length = tokens + pad_rows
    block = max(size for size in (512, 256, _LANES) if length % size == 0)
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[1]),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
    )
    prompt = (jnp.arange(length) >= start[:, None] + pad_rows).astype(jnp.int32)

    def one_row(q, k, v, segment):
        return kernel(q, k, v, segment_ids=splash.SegmentIds(q=segment, kv=segment))

    out = jnp.asarray(jax.vmap(one_row)(q, k, v, prompt))
    return out[:, :, pad_rows:, :dim].astype(v.dtype)
