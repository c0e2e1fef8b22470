"""`decode_attention` on a GPU: flash-decoding in one launch, and a second one that merges what its programs found.

    prompt k, v [L, B, N, C, D]  | split 0    | split 1    |...     one program each, for the query heads that share a
                                 |tile|tile|..|tile|tile|..|        head: a running maximum and sum (online softmax)
    new    k, v [L, B, K, M, D]  | split 0    |...                  other programs of the same launch, K heads
    out [B, H, P, D], log_sum_exp [B, H, P]     of all P splits, merged afterwards: about 2 % of the bytes

The online softmax is Milakov & Gimelshein's (arXiv 1805.02867), its use on tiles FlashAttention's (arXiv 2205.14135).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.arithmetic import product, round_up
from kernels_pallas.decode_attention.parts import Slots, mixed_in
from kernels_pallas.gpu_backend import check_offsets, gpu_call, triton

_DOT = 16  # tensor cores multiply no smaller matrices
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
_IN_FLIGHT = 64 << 10  # bytes of keys and values that a program has asked for: as much as any GPU's shared memory holds
_MERGED = 64  # splits at once


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int  # query heads in one program, a power of two
    slots: int  # a turn of the loop, a power of two
    splits: int  # at most
    stages: int = 2  # turns in flight


def tiles_for(batch_heads: int, rows: int, slots: int, row_bytes: int) -> Tiles:
    """`row_bytes`: of a key as it is stored, padded to a power of two numbers.

    rows: up to 64 queries a program share the slots it loads.
    slots: 8 KiB of keys and as much of values, four turns in flight; few, long rows come in fewer turns.
    splits: enough programs to fill the chip, each with so many slots that its result is small beside what it reads.
    """
    rows_each = max(_DOT, min(64, pl.next_power_of_2(rows)))
    splits = min(pl.cdiv(_PROGRAMS, batch_heads * pl.cdiv(rows, rows_each)), pl.cdiv(slots, max(256, 16 * rows)))
    slots_each = max(_DOT, min(128, _IN_FLIGHT // 8 // row_bytes))
    return Tiles(rows_each, slots_each, splits, max(2, min(4, _IN_FLIGHT // (2 * slots_each * row_bytes))))


class Part(NamedTuple):
    """How the programs of a part share its slots."""

    heads: int  # of the slots
    rows: int  # query heads for each
    blocks: int  # of rows
    splits: int
    share: int  # slots of a split: so that the last one is not much shorter than others
    before: int  # splits of the parts before it
    tiles: Tiles

    def programs(self, batch: int) -> int:
        """How many."""
        return batch * self.heads * self.blocks * self.splits


def _part(q, slots: Slots, before: int, tiles: Tiles | None) -> Part:
    """Of q [B, H, D] and slots [L, B, N, C, ...]: programs for all of them, `before` splits being other parts'."""
    batch, query_heads, dim = q.shape
    heads, capacity = slots.k.shape[2:4]
    rows, lanes = query_heads // heads, max(_DOT, pl.next_power_of_2(dim))
    tiles = tiles or tiles_for(batch * heads, rows, capacity, lanes * slots.k.dtype.itemsize)
    share = round_up(pl.cdiv(capacity, tiles.splits), min(_DOT, tiles.slots))
    return Part(heads, rows, pl.cdiv(rows, tiles.rows), pl.cdiv(capacity, share), share, before, tiles)


def decode_attention(q, prompt: Slots, new: Slots, filled, layer, *, interpret=False, tiles: Tiles | None = None):
    """[B, H, D] of q [B, H, D]. Raises `ValueError` for entries that a kernel would not find."""
    batch, query_heads, dim = q.shape
    there = [(slots, at.reshape(1)) for slots, at in zip((prompt, new), layer, strict=True) if slots.k.shape[3]]
    parts: list[Part] = []
    for slots, _ in there:
        check_offsets("decode_attention", slots.k)
        parts.append(_part(q, slots, sum(part.splits for part in parts), tiles))
    shape = batch, query_heads, sum(part.splits for part in parts)
    out, log_sum_exp = gpu_call(
        functools.partial(_kernel, parts=parts, group=query_heads // new.k.shape[2]),
        name="decode_attention",
        grid=(sum(part.programs(batch) for part in parts),),
        out_shape=[jax.ShapeDtypeStruct((*shape, dim), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        warps=4,
        stages=min(part.tiles.stages for part in parts),
        interpret=interpret,
    )(filled, q, there)
    return gpu_call(
        _merge,
        name="merge",
        grid=(batch, query_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        warps=4,
        stages=2,
        interpret=interpret,
    )(out, log_sum_exp)


def _kernel(
    # Inputs
    filled_ref,  # [B]
    q_ref,  # [B, H, D]
    there,  # of each part: its slots, k and v [L, B, N, C, D], the others [L, B, N, C] or None; and the layer [1]
    # Outputs
    out_ref,  # [B, H, P, D]
    log_sum_exp_ref,  # [B, H, P]
    *,
    parts: list[Part],
    group: int,
):
    program, first = pl.program_id(0), 0
    for part, (slots, layer_ref) in zip(parts, there, strict=True):
        mine = functools.partial(
            _attend, program - first, filled_ref, q_ref, slots, layer_ref, out_ref, log_sum_exp_ref, part, group
        )
        stop = first + part.programs(q_ref.shape[0])
        pl.when((first <= program) & (program < stop))(mine)
        first = stop


def _attend(program, filled_ref, q_ref, slots: Slots, layer_ref, out_ref, log_sum_exp_ref, part: Part, group: int):
    """One split of the slots of one head, for a block of the query heads that look at it."""
    tiles, capacity, dim = part.tiles, *slots.k.shape[3:]
    split, rest = lax.rem(program, part.splits), lax.div(program, part.splits)
    block, rest = lax.rem(rest, part.blocks), lax.div(rest, part.blocks)
    head, batch = lax.rem(rest, part.heads), lax.div(rest, part.heads)
    row = block * tiles.rows + jnp.arange(tiles.rows)  # among the query heads of this head
    lane = jnp.arange(max(_DOT, pl.next_power_of_2(dim)))
    place = (batch, head * part.rows + row[:, None])
    real = (row < part.rows)[:, None] & (lane < dim)[None]
    q = triton().load(q_ref.at[(*place, lane[None])], mask=real, other=0)
    begin = split * part.share
    used = jnp.minimum(filled_ref[batch], capacity) if slots.positions is None else capacity
    end = jnp.minimum(begin + part.share, used)

    def turn(tile, carry):
        before, total, out = carry
        slot = begin + tile * tiles.slots + jnp.arange(tiles.slots)
        inside = slot < end

        def numbers(ref):
            return triton().load(ref.at[layer_ref[0], batch, head, slot], mask=inside, other=0)

        def entries(ref, dtype):
            mask = inside[:, None] & (lane < dim)[None]
            loaded = triton().load(ref.at[layer_ref[0], batch, head, slot[:, None], lane[None]], mask=mask)
            loaded = loaded.astype(dtype)
            return jnp.where(mask, loaded, jnp.zeros_like(loaded))  # not load(other=0): Triton has no float8 zero

        logits = product(q, entries(slots.k, q.dtype), 1) * dim**-0.5  # [rows, slots]
        if slots.k_scale is not None:
            logits *= numbers(slots.k_scale).astype(jnp.float32)[None]
        there = inside[None]
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
        dtype = mixed_in(q.dtype, slots)
        return most, total, out * fade[:, None] + product(weights.astype(dtype), entries(slots.v, dtype), 0)

    nothing = jnp.full(tiles.rows, -jnp.inf), jnp.zeros(tiles.rows), jnp.zeros(q.shape)
    turns = lax.div(jnp.maximum(end - begin, 0) + tiles.slots - 1, tiles.slots)
    most, total, out = lax.fori_loop(0, turns, turn, nothing)
    out /= jnp.where(total > 0, total, 1.0)[:, None]
    triton().store(out_ref.at[(*place, part.before + split, lane[None])], out, mask=real)
    log_sum_exp = most + jnp.log(total)  # -inf where nothing was seen
    place = batch, head * part.rows + row, part.before + split
    triton().store(log_sum_exp_ref.at[place], log_sum_exp, mask=row < part.rows)


def _merge(
    # Inputs
    parts_ref,  # [B, H, P, D]
    log_sum_exp_ref,  # [B, H, P]
    # Output
    out_ref,  # [B, H, D]
):
    """Each split counts by the sum of its exponentials; at least one is not empty."""
    batch, head = pl.program_id(0), pl.program_id(1)
    splits, dim = parts_ref.shape[2:]
    lane, every = jnp.arange(pl.next_power_of_2(dim)), jnp.arange(pl.next_power_of_2(splits))

    def sums(split) -> Any:
        return triton().load(log_sum_exp_ref.at[batch, head, split], mask=split < splits, other=-jnp.inf)

    most = sums(every).max(axis=0)
    total = jnp.exp(sums(every) - most).sum(axis=0)
    some = min(_MERGED, len(every))

    def turn(step, out):
        split = step * some + jnp.arange(some)
        mask = (split < splits)[:, None] & (lane < dim)[None]
        found = triton().load(parts_ref.at[batch, head, split[:, None], lane[None]], mask=mask, other=0)
        return out + (found * jnp.exp(sums(split) - most)[:, None]).sum(axis=0)

    out = lax.fori_loop(0, pl.cdiv(splits, some), turn, jnp.zeros(len(lane))) / total
    triton().store(out_ref.at[batch, head, lane], out.astype(out_ref.dtype), mask=lane < dim)
