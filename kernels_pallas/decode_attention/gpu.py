"""`decode_attention` on a GPU: flash-decoding, the slots of each cache head split over the multiprocessors.

    k, v [L, B, N, C, D]  | split 0    | split 1    |...     one program each, for the query heads that share the head
                          |tile|tile|..|tile|tile|..|        with a running maximum and sum (online softmax)
    out  [B, N, splits, H/N, D], log_sum_exp [B, N, splits, H/N]     merged afterwards: about 2 % of the bytes

The online softmax is Milakov & Gimelshein's (arXiv 1805.02867), its use on tiles FlashAttention's (arXiv 2205.14135).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.arithmetic import product
from kernels_pallas.decode_attention.parts import Slots, attend_to_both
from kernels_pallas.gpu_backend import gpu_call, triton

_DOT = 16  # tensor cores multiply no smaller matrices
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int  # query heads in one program, a power of two
    slots: int  # a turn of the loop, a power of two
    splits: int


def tiles_for(batch_heads: int, rows: int, slots: int, row_bytes: int) -> Tiles:
    """`row_bytes`: of a key as it is multiplied, padded to a power of two.

    rows: up to 64 queries a program share the slots it loads.
    slots: 16 KiB of keys and as much of values, so that two tiles in flight fit in any GPU's shared memory.
    splits: enough programs to fill the chip, each with so many slots that its result is small beside what it reads.
    """
    rows_each = max(_DOT, min(64, pl.next_power_of_2(rows)))
    splits = min(pl.cdiv(_PROGRAMS, batch_heads * pl.cdiv(rows, rows_each)), pl.cdiv(slots, max(256, 16 * rows)))
    return Tiles(rows_each, max(_DOT, min(128, (16 << 10) // row_bytes)), splits)


def decode_attention(q, prompt: Slots, new: Slots, filled, layer, *, interpret=False, tiles=None):
    attend = functools.partial(_attend, interpret=interpret, tiles=tiles)
    return attend_to_both(attend, q, prompt, new, filled, layer)


def _attend(q, slots: Slots, layer, used, group: int, *, interpret: bool, tiles: Tiles | None):
    batch, query_heads, dim = q.shape
    heads, capacity = slots.k.shape[2:4]
    rows, lanes = query_heads // heads, max(_DOT, pl.next_power_of_2(dim))
    tiles = tiles or tiles_for(batch * heads, rows, capacity, lanes * q.dtype.itemsize)
    blocks = pl.cdiv(rows, tiles.rows)

    q = q.reshape(batch * heads, rows, dim)
    q = jnp.pad(q, ((0, 0), (0, blocks * tiles.rows - rows), (0, lanes - dim)))
    slots = Slots(*(None if x is None else x.reshape(-1, *x.shape[3:]) for x in slots))
    out, log_sum_exp = gpu_call(
        functools.partial(_kernel, tiles=tiles, heads=heads, group=group),
        name="decode_attention",
        grid=(batch * heads, blocks, tiles.splits),
        out_shape=[
            jax.ShapeDtypeStruct((batch * heads, tiles.splits, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch * heads, tiles.splits, rows), jnp.float32),
        ],
        warps=4,
        stages=2,
        interpret=interpret,
    )(layer.reshape(1), used, q, slots)
    out = out.swapaxes(1, 2).reshape(batch, query_heads, tiles.splits, dim)
    return out, log_sum_exp.swapaxes(1, 2).reshape(batch, query_heads, tiles.splits)


def _kernel(
    # Inputs
    layer_ref,  # [1]
    used_ref,  # [B]
    q_ref,  # [B*N, rows, D], rows and D up to whole tiles and powers of two
    slots: Slots,  # k, v [L*B*N, C, D]; positions, heads, k_scale, v_scale [L*B*N, C] or None
    # Outputs
    out_ref,  # [B*N, splits, H/N, D]
    log_sum_exp_ref,  # [B*N, splits, H/N]
    *,
    tiles: Tiles,
    heads: int,
    group: int,
):
    head, split = pl.program_id(0), pl.program_id(2)
    first = pl.multiple_of(pl.program_id(1) * tiles.rows, tiles.rows)
    used = used_ref[head // heads]
    capacity, dim = slots.k.shape[1:]
    row, lane = first + jnp.arange(tiles.rows), jnp.arange(q_ref.shape[2])
    q = q_ref[head, pl.ds(first, tiles.rows), :]
    place = layer_ref[0] * pl.num_programs(0) + head  # of the head's slots

    def turn(tile, carry):
        before, total, out = carry
        slot = tile * tiles.slots + jnp.arange(tiles.slots)
        inside = slot < capacity

        def numbers(ref):
            return triton().load(ref.at[place, slot], mask=inside, other=0)

        def entries(ref):
            mask = inside[:, None] & (lane[None] < dim)
            loaded = triton().load(ref.at[place, slot[:, None], lane[None]], mask=mask).astype(q.dtype)
            return jnp.where(mask, loaded, jnp.zeros_like(loaded))  # not load(other=0): Triton has no float8 zero

        logits = product(q, entries(slots.k), 1) * dim**-0.5  # [rows, slots]
        if slots.k_scale is not None:
            logits *= numbers(slots.k_scale).astype(jnp.float32)[None]
        there = (slot < used)[None]
        if slots.positions is not None:
            there &= (numbers(slots.positions) >= 0)[None]
        if slots.heads is not None:
            there = there & (numbers(slots.heads)[None] == (row // group)[:, None])
        logits = jnp.where(there, logits, -jnp.inf)

        most = jnp.maximum(before, logits.max(axis=1))
        finite = jnp.where(most == -jnp.inf, 0.0, most)
        weights, fade = jnp.exp(logits - finite[:, None]), jnp.exp(before - finite)
        total = total * fade + weights.sum(axis=1)
        if slots.v_scale is not None:
            weights *= numbers(slots.v_scale).astype(jnp.float32)[None]
        return most, total, out * fade[:, None] + product(weights.astype(q.dtype), entries(slots.v), 0)

    steps = pl.cdiv(pl.cdiv(capacity, tiles.slots), tiles.splits)  # of one split
    upper = jnp.minimum((split + 1) * steps, (used + tiles.slots - 1) // tiles.slots)
    nothing = jnp.full(tiles.rows, -jnp.inf), jnp.zeros(tiles.rows), jnp.zeros(q.shape)
    most, total, out = lax.fori_loop(split * steps, upper, turn, nothing)
    out /= jnp.where(total > 0, total, 1.0)[:, None]
    real = row < out_ref.shape[2]
    mask = real[:, None] & (lane[None] < dim)
    triton().store(out_ref.at[head, split, row[:, None], lane[None]], out, mask=mask)
    log_sum_exp = most + jnp.log(total)  # -inf where nothing was seen
    triton().store(log_sum_exp_ref.at[head, split, row], log_sum_exp, mask=real)
