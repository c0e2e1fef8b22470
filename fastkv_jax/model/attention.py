"""Causal attention over right-aligned rows, by explicit platform: blocked (CPU), cuDNN (GPU), splash (TPU).

Not a kernel of ours: the two accelerators' own flash attention, and for the CPU a form that never holds the T x T map.
That form also reads what cuDNN has no attention for, float32 above all.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from fastkv_jax.model.platforms import Platform, cudnn_attends, full_precision
from fastkv_jax.model.sharding import DATA, MODEL, SEQUENCE, spec

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

    With a mesh each device runs its rows, its heads, and its share of the queries against all keys.
    """
    with full_precision(platform, q.dtype):
        return _local(platform, q, k, v, start) if mesh is None else _spread(platform, mesh, q, k, v, start)


def _local(platform: Platform, q, k, v, start):
    if platform == "tpu":
        return _splash(q, k, v, start)
    if platform == "gpu" and cudnn_attends(q.dtype, q.shape[3]):
        return _cudnn(q, k, v, start)
    return _blocked(q, k, v, start)


def _spread(platform: Platform, mesh: Mesh, q, k, v, start):
    queries = spec(mesh, q.shape, DATA, MODEL, SEQUENCE)
    entries = spec(mesh, k.shape, DATA, MODEL)
    shards = mesh.shape[SEQUENCE] if SEQUENCE in queries else 1
    if platform == "tpu" and q.shape[2] // shards % _LANES:  # not worth whole registers
        queries, shards = spec(mesh, q.shape, DATA, MODEL), 1

    def local(q, k, v, start):
        if shards == 1:
            return _local(platform, q, k, v, start)
        share = lax.axis_index(SEQUENCE)
        if platform == "tpu":
            turns = [partial(_splash, shard=i) for i in range(shards)]
            return lax.switch(share, turns, q, k, v, start)
        return _blocked(q, k, v, start, share * q.shape[2])  # cuDNN's causal mask knows no offset

    specs = (queries, entries, entries, spec(mesh, start.shape, DATA))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, start)


def _blocked(q, k, v, start, offset: int | Int[Array, ""] = 0):
    """Online softmax over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867), queries a block at a time.

    The group is folded into the rows of one product per KV head. Blocks right of the diagonal or left of every row's
    start are never visited, so padding to a bucket costs nothing here. The queries may be a part of the rows, the
    first of them in row `offset`.
    """
    dim, query_block, key_block = k.shape[3], *_block_sizes(q.shape[2], k.shape[2])
    query_pad, pad = -q.shape[2] % query_block, -k.shape[2] % key_block  # more left padding changes nothing
    q = jnp.pad(q, ((0, 0), (0, 0), (query_pad, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (pad, 0), (0, 0))) for x in (k, v))
    start, offset = start + pad, offset + pad - query_pad

    batch, kv_heads, _, _ = k.shape
    group, length = q.shape[1] // kv_heads, q.shape[2]
    q = (q * jnp.asarray(dim**-0.5, q.dtype)).reshape(batch, kv_heads, group, length, dim)
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # the extra column sums the weights
    first_key_block, last_padded_block = start.min() // key_block, -(-start.max() // key_block)

    def query_rows(index):
        first = offset + index * query_block
        rows = (first + jnp.arange(query_block))[None]
        queries = lax.dynamic_slice_in_dim(q, index * query_block, query_block, axis=3)
        queries = queries.reshape(batch, kv_heads, group * query_block, dim)

        def visit(block, carry, edge):
            highest, summed = carry
            keys = lax.dynamic_slice_in_dim(k, block * key_block, key_block, axis=2)
            values = lax.dynamic_slice_in_dim(v, block * key_block, key_block, axis=2)
            logits = jnp.einsum("bkrd,bktd->bkrt", queries, keys, preferred_element_type=jnp.float32)
            if edge:
                columns = (block * key_block + jnp.arange(key_block))[None, None]
                seen = (columns <= rows[..., None]) & (columns >= start[:, None, None])  # [B, query, key]
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
    return out[:, :, query_pad:]


def _block_sizes(queries: int, keys: int) -> tuple[int, int]:
    """Of queries and of keys; a short prompt is one block."""
    if queries == keys <= _KEY_BLOCK:
        return queries, keys
    return min(_QUERY_BLOCK, queries), min(_KEY_BLOCK, keys)


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
        there = there & (owner[:, :, None] == (jnp.arange(heads) // (heads // k.shape[1]))[None, None, :, None])
    there = jnp.broadcast_to(there, (batch, there.shape[1], heads // past_k.shape[1], there.shape[-1]))
    there = there.reshape(batch, heads, 1, -1)
    columns = jnp.arange(tokens)[None, None]

    def product(spec, a, b):  # b has fewer heads: fold the group of each into a's axes
        grouped = a.reshape(batch, b.shape[1], -1, *a.shape[2:])
        out = jnp.einsum(spec, grouped, b, preferred_element_type=jnp.float32)
        return out.reshape(batch, heads, *out.shape[3:])

    def one_block(block_and_index):
        block, index = block_and_index
        rows = (index * _AFTER_BLOCK - pad + jnp.arange(_AFTER_BLOCK))[None]
        seen = (columns <= rows[..., None]) & (columns >= start[:, None, None])  # [B, Q, T]
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
    """cuDNN's flash attention. It masks padding only on the right, so rows move to the left and back.

    Zeros follow them there, and come before them back here: neither what stands in the padding nor what cuDNN leaves in
    rows behind the lengths, which it need not write, meets a real row, where 0 x NaN would stay.
    """
    tokens = q.shape[2]
    lengths = (tokens - start).astype(jnp.int32)
    q, k, v = (_shifted(x, (0, tokens), start).swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return _shifted(out.swapaxes(1, 2), (tokens, 0), lengths)


def _shifted(x: Float[Array, "B N T D"], pad: tuple[int, int], first: Int[Array, " B"]) -> Float[Array, "B N T D"]:
    """T rows from `first` on, of rows with so many of zeros before and behind them.

    One row of a batch is a slice, which XLA copies and fuses with what made it, where a gather looks up the place of
    each number. Rows and their numbers are one axis here: XLA would else hand the layout that cuDNN likes on to the
    cache, and turn over all of it at the end.
    """
    *heads, tokens, dim = x.shape
    flat = jnp.pad(x.reshape(*heads, -1), ((0, 0), (0, 0), (pad[0] * dim, pad[1] * dim)))
    if len(first) == 1:
        flat = lax.dynamic_slice_in_dim(flat, first[0] * dim, tokens * dim, axis=2)
    else:
        flat = jax.vmap(lambda x, first: lax.dynamic_slice_in_dim(x, first * dim, tokens * dim, axis=1))(flat, first)
    return flat.reshape(x.shape)


def _causal(shape: tuple[int, int], first: int):
    """Splash attention's causal mask. It looks at every block twice, for half a minute at 131,072 tokens.

    A block beside the diagonal is all seen or all unseen: one element says it.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class Causal(splash.CausalMask):
        def __getitem__(self, idx) -> np.ndarray:
            rows, columns = idx
            seen, unseen = rows.start + first >= columns.stop - 1, rows.stop - 1 + first < columns.start
            return np.array([[seen]]) if seen or unseen else super().__getitem__(idx)

    return Causal(shape, offset=first)


def _splash(q, k, v, start, shard: int = 0):
    """JAX's splash attention for TPU; padding is another segment than the prompt. Blocks must divide the length.

    The queries may be one of the equal parts of the rows, number `shard`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    rows, dim = q.shape[2:]
    pad_rows, pad_keys, pad_dim = -rows % _LANES, -k.shape[2] % _LANES, -dim % _LANES
    q = q * jnp.asarray(dim**-0.5, q.dtype)
    q = jnp.pad(q, ((0, 0), (0, 0), (pad_rows, 0), (0, pad_dim)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (pad_keys, 0), (0, pad_dim))) for x in (k, v))
    length, first = k.shape[2], shard * rows
    blocks = [max(size for size in (512, 256, _LANES) if x.shape[2] % size == 0) for x in (q, k)]
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([_causal((q.shape[2], length), first)] * q.shape[1]),
        block_sizes=splash.BlockSizes(block_q=blocks[0], block_kv=blocks[1], block_kv_compute=blocks[1]),
    )
    prompt = (jnp.arange(length)[None] >= start[:, None] + pad_keys).astype(jnp.int32)

    def one_row(q, k, v, segment):
        mine = segment[first : first + q.shape[1]]
        return kernel(q, k, v, segment_ids=splash.SegmentIds(q=mine, kv=segment))

    out = jnp.asarray(jax.vmap(one_row)(q, k, v, prompt))
    return out[:, :, pad_rows:, :dim].astype(v.dtype)
