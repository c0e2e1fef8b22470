"""`window_scores` on a GPU: two kernels that each read the keys once, and pooling by XLA.

    measure   [B*K, row blocks, splits]   the maximum and the sum of exponentials of each query over a split of T
    add_up    [B*K, row blocks, tiles]    exp(logits - maximum) / sum, added over the W queries of each head

No multiprocessor holds the logits of a whole row, so the second kernel computes them again: their float32 written and
read once would cost as much as the keys of a head (G*W = 32 queries, D = 128, bfloat16). The sums over the splits are
joined as in flash-decoding; the online softmax is Milakov & Gimelshein's (arXiv 1805.02867).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gpu_backend import gpu_call, triton
from kernels_pallas.window_scores.reference import pool

_DOT = 16  # tensor cores multiply no smaller matrices
_PROGRAMS = 528  # four for each of an H100's 132 multiprocessors


@dataclasses.dataclass(frozen=True)
class Tiles:
    heads: int  # query heads of a group in one program, a power of two
    keys: int  # a turn of the loop, a power of two
    splits: int  # of T, for the first kernel


def tiles_for(batch_heads: int, group: int, window: int, tokens: int, row_bytes: int) -> Tiles:
    """`window` and `row_bytes` (of a key) are powers of two.

    heads: 16 to 64 queries a program share the keys it loads; more would need more registers than there are.
    keys: 16 KiB, so that three tiles in flight fit in shared memory beside each other on any GPU since Ampere.
    splits: enough programs to fill the chip, each with 1,024 keys at least.
    """
    heads = max(min(pl.next_power_of_2(group), 64 // window), _DOT // window, 1)
    splits = min(pl.cdiv(_PROGRAMS, batch_heads * pl.cdiv(group, heads)), pl.cdiv(tokens, 1024))
    return Tiles(heads, max(_DOT, min(128, (16 << 10) // row_bytes)), splits)


def window_scores(q, k, start, stop, *, kernel_size, pooling, interpret=False, tiles: Tiles | None = None):
    batch, query_heads, window, dim = q.shape
    heads, tokens = k.shape[1:3]
    group = query_heads // heads
    width, lanes = pl.next_power_of_2(window), max(_DOT, pl.next_power_of_2(dim))
    tiles = tiles or tiles_for(batch * heads, group, width, tokens, lanes * k.dtype.itemsize)
    blocks, rows = pl.cdiv(group, tiles.heads), tiles.heads * width

    q = q.reshape(batch * heads, group, window, dim)
    q = jnp.pad(q, ((0, 0), (0, blocks * tiles.heads - group), (0, width - window), (0, lanes - dim)))
    q = q.reshape(batch * heads, blocks, rows, lanes)
    k = k.swapaxes(1, 2)  # as cuDNN's attention has it: one layout for both, and no copy of the keys

    logits = functools.partial(_logits, window=window, width=width, keys=tiles.keys)
    call = functools.partial(gpu_call, warps=4, stages=3, interpret=interpret)
    parts = jax.ShapeDtypeStruct((batch * heads, blocks, tiles.splits, rows), jnp.float32)
    most, total = call(
        functools.partial(_measure_kernel, logits, heads, tiles),
        name="window_scores_measure",
        grid=(batch * heads, blocks, tiles.splits),
        out_shape=[parts, parts],
    )(start, stop, q, k)

    highest = most.max(axis=2)
    total = (total * jnp.exp(most - _finite(highest)[:, :, None])).sum(axis=2)
    summed = call(
        functools.partial(_add_up_kernel, logits, heads, tiles, window),
        name="window_scores_add_up",
        grid=(batch * heads, blocks, pl.cdiv(tokens, tiles.keys)),
        out_shape=jax.ShapeDtypeStruct((batch * heads, group, tokens), jnp.float32),
    )(start, stop, q, k, highest, total)
    return pool(summed.reshape(batch, heads, group, tokens), kernel_size, pooling).sum(axis=2)


def _measure_kernel(
    logits,
    heads: int,
    tiles: Tiles,
    # Inputs
    start_ref,  # [B]
    stop_ref,  # [B]
    q_ref,  # [B*K, blocks, rows, D]
    k_ref,  # [B, T, K, D]
    # Outputs
    most_ref,  # [B*K, blocks, splits, rows]
    total_ref,  # [B*K, blocks, splits, rows]
):
    head, block, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, stop = start_ref[head // heads], stop_ref[head // heads]
    steps = pl.cdiv(pl.cdiv(k_ref.shape[1], tiles.keys), tiles.splits)  # of one split
    lower = jnp.maximum(split * steps, start // tiles.keys)
    upper = jnp.minimum((split + 1) * steps, (stop + tiles.keys - 1) // tiles.keys)

    def turn(tile, carry):
        before, total = carry
        here, _ = logits(q_ref, k_ref, head, block, tile, start, stop)
        most = jnp.maximum(before, here.max(axis=1))
        finite = _finite(most)
        return most, total * jnp.exp(before - finite) + jnp.exp(here - finite[:, None]).sum(axis=1)

    rows = q_ref.shape[2]
    most, total = lax.fori_loop(lower, upper, turn, (jnp.full(rows, -jnp.inf), jnp.zeros(rows)))
    most_ref[head, block, split, :] = most
    total_ref[head, block, split, :] = total


def _add_up_kernel(
    logits,
    heads: int,
    tiles: Tiles,
    window: int,
    # Inputs
    start_ref,  # [B]
    stop_ref,  # [B]
    q_ref,  # [B*K, blocks, rows, D]
    k_ref,  # [B, T, K, D]
    most_ref,  # [B*K, blocks, rows]
    total_ref,  # [B*K, blocks, rows]
    # Output
    out_ref,  # [B*K, G, T]
):
    head, block, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, stop = start_ref[head // heads], stop_ref[head // heads]
    group, tokens = out_ref.shape[1:]
    most, total = most_ref[head, block, :], total_ref[head, block, :]
    share = 1 / jnp.where(total > 0, total, 1.0)  # a query that sees no key: all 0
    here, column = logits(q_ref, k_ref, head, block, tile, start, stop)
    weights = jnp.exp(here - _finite(most)[:, None]) * share[:, None]
    summed = weights.reshape(tiles.heads, -1, tiles.keys).sum(axis=1)
    of_group = block * tiles.heads + jnp.arange(tiles.heads)
    triton().store(
        out_ref.at[head, of_group[:, None], column[None]],
        jnp.where(column[None] < stop - window, summed, 0.0),
        mask=(of_group[:, None] < group) & (column[None] < tokens),
    )


def _logits(q_ref, k_ref, head, block, tile, start, stop, *, window: int, width: int, keys: int):
    """[rows, keys], -inf where the query does not see the key, and the columns [keys]."""
    _, tokens, heads, dim = k_ref.shape
    rows, lanes = q_ref.shape[2:]
    column, lane = tile * keys + jnp.arange(keys), jnp.arange(lanes)
    k = triton().load(
        k_ref.at[head // heads, column[:, None], head % heads, lane[None]],
        mask=(column[:, None] < tokens) & (lane[None] < dim),
        other=0,
    )
    precision = lax.Precision.HIGHEST if k.dtype == jnp.float32 else lax.Precision.DEFAULT
    products = lax.dot_general(
        q_ref[head, block],
        k,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    w = (jnp.arange(rows) % width)[:, None]
    seen = (column[None] >= start) & (column[None] <= stop - window + w) & (w < window)
    return jnp.where(seen, products * dim**-0.5, -jnp.inf), column


def _finite(most):
    return jnp.where(most == -jnp.inf, 0.0, most)
