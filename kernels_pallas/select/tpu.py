"""`select` on a TPU: bisection over scores held in VMEM, then a shift network instead of a scatter. No sort.

A row of T scores lies in VMEM as [T/128, 128], so that one row alone fills the registers; its flat order is the
columns'. Every chosen column moves right, past the unchosen ones behind it, by `far` places:

    column  0 1 2 3 4 5        chosen  . x . . x x        far  . 2 . . 0 0        ->    . . . 1 4 5

One step a bit of `far`, lowest first: the elements with the bit set move by 2^bit. Two chosen columns never meet on the
way: of a < b, a moves at most b - a - 1 places further than b, in all and so modulo every power of two. An element that
ends at p came from p - far, so `far` is all that has to move.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arithmetic import round_up
from kernels_pallas.dispatch import tpu_interpret

_LANES, _SUBLANES = 128, 8
_REGISTER = _LANES * _SUBLANES
_SIGN, _MAGNITUDE = np.int32(-(2**31)), np.int32(2**31 - 1)
_VMEM_LIMIT = 56 << 20  # v5p and tpu7x have 64 MiB a core; a row of 131,072 takes 4 MiB, one of 1,048,576 takes 28


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int  # of 128 scores: what a turn of the inner loops handles; a power of two if a score has more


def tiles_for(tokens: int) -> Tiles:
    """64 rows are 8 vector registers: enough independent work to hide latencies, and two dozen more fit beside them."""
    return Tiles(min(64, round_up(pl.cdiv(tokens, _LANES), _SUBLANES)))


def select(scores, count, capacity, *, interpret=False, tiles: Tiles | None = None):
    slots = round_up(capacity, _REGISTER)
    out = _call(_select_kernel, "select", scores, count, slots, interpret, tiles)
    return out[..., slots - capacity :].reshape(*scores.shape[:-1], capacity)


def among_best(scores, count, *, interpret=False, tiles: Tiles | None = None):
    out = _call(_mark_kernel, "among_best", scores, count, None, interpret, tiles)
    return (out[..., : scores.shape[-1]] != 0).reshape(scores.shape)


def _call(kernel, name: str, scores, count, slots: int | None, interpret: bool, tiles: Tiles | None):
    """[S, slots] int32; as many slots as padded columns if None."""
    tokens, batch = scores.shape[-1], math.prod(scores.shape[:-1])
    tiles = tiles or tiles_for(tokens)
    columns = round_up(tokens, tiles.rows * _LANES)
    slots = slots or columns
    scores = scores.astype(jnp.float32).reshape(batch, tokens)
    scores = jnp.pad(scores, ((0, 0), (0, columns - tokens)), constant_values=-jnp.inf)  # the last to be chosen
    rows = columns // _LANES
    out = pl.pallas_call(
        functools.partial(kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[pl.BlockSpec((None, rows, _LANES), lambda s, *_: (s, 0, 0))],
            out_specs=pl.BlockSpec((None, slots // _LANES, _LANES), lambda s, *_: (s, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((rows, _LANES), jnp.int32),
                pltpu.VMEM((tiles.rows + rows, _LANES), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, slots // _LANES, _LANES), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_LIMIT),
        interpret=tpu_interpret(interpret),
        name=name,
    )(count.reshape(batch), scores.reshape(batch, rows, _LANES))
    return out.reshape(batch, slots)


def _mark_kernel(
    # Scalars
    count_ref,  # [S]
    # Input
    scores_ref,  # [columns / 128, 128]
    # Output
    out_ref,  # [columns / 128, 128] int32: 1 where chosen
    # Scratch
    keys_ref,  # [columns / 128, 128] int32
    _,  # what only the other kernel needs
    *,
    tiles: Tiles,
):
    def mark(here, chosen, rank):
        out_ref[here, :] = chosen.astype(jnp.int32)

    _choose(count_ref[pl.program_id(0)], scores_ref, keys_ref, mark, tiles)


def _select_kernel(
    # Scalars
    count_ref,  # [S]
    # Input
    scores_ref,  # [columns / 128, 128]
    # Output
    out_ref,  # [slots / 128, 128] int32: the chosen columns, right-aligned
    # Scratch
    keys_ref,  # [columns / 128, 128] int32
    far_ref,  # [tiles.rows + columns / 128, 128] int32: how far each element has to go in all; rows of 0 in front
    *,
    tiles: Tiles,
):
    count = count_ref[pl.program_id(0)]
    rows, columns = keys_ref.shape[0], keys_ref.size
    chunks = rows // tiles.rows

    def measure(here, chosen, rank):
        behind = columns - 1 - _flat((tiles.rows, _LANES), here.start)
        far = jnp.where(chosen, behind - (count - rank), 0)
        far_ref[pl.ds(pl.multiple_of(here.start + tiles.rows, _SUBLANES), tiles.rows), :] = far

    far_ref[: tiles.rows, :] = jnp.zeros((tiles.rows, _LANES), jnp.int32)
    _choose(count, scores_ref, keys_ref, measure, tiles)

    def backwards(move):
        """Each chunk of far from the last to the first: what moves in comes from before, still as it was."""

        def turn(i, _):
            start = pl.multiple_of((chunks - i) * tiles.rows, _SUBLANES)  # behind the rows of 0
            far_ref[pl.ds(start, tiles.rows), :] = move(start)

        lax.fori_loop(0, chunks, turn, None)

    bits = (columns - 1).bit_length()
    low = min(bits, _REGISTER.bit_length() - 1)

    def move_near(start):
        """The steps that add up to less than a register: what they bring in comes from the 8 rows before."""
        far = far_ref[pl.ds(pl.multiple_of(start - _SUBLANES, _SUBLANES), tiles.rows + _SUBLANES), :]
        for bit in range(low):
            far = _move(far, _shift(far, 1 << bit), bit)
        return far[_SUBLANES:]

    backwards(move_near)
    for bit in range(low, bits):  # whole registers: only addresses

        def move_far(start, bit=bit):
            source = pl.multiple_of(jnp.maximum(start - (1 << bit) // _LANES, 0), _SUBLANES)
            return _move(far_ref[pl.ds(start, tiles.rows), :], far_ref[pl.ds(source, tiles.rows), :], bit)

        backwards(move_far)

    first = rows - out_ref.shape[0]  # the row of far where the slots begin

    def write(i, _):
        row = pl.multiple_of(first + i * _SUBLANES, _SUBLANES)
        place = _flat((_SUBLANES, _LANES), row)
        column = place - far_ref[pl.ds(pl.multiple_of(tiles.rows + row, _SUBLANES), _SUBLANES), :]
        here = pl.ds(pl.multiple_of(i * _SUBLANES, _SUBLANES), _SUBLANES)
        out_ref[here, :] = jnp.where(place >= columns - count, column, -1)

    lax.fori_loop(0, out_ref.shape[0] // _SUBLANES, write, None)


def _choose(count, scores_ref, keys_ref, visit, tiles: Tiles):
    """Calls visit(rows, chosen, rank) with every chunk, rank being the number of chosen columns up to each."""
    chunks = keys_ref.shape[0] // tiles.rows

    def chunk(i):
        return pl.ds(pl.multiple_of(i * tiles.rows, _SUBLANES), tiles.rows)

    def order(i, _):
        """int32 keys in the order of the floats: flip all but the sign of negatives; -0 equals 0."""
        bits = lax.bitcast_convert_type(scores_ref[chunk(i), :], jnp.int32)
        keys_ref[chunk(i), :] = jnp.where(bits >= 0, bits, jnp.where(bits == _SIGN, 0, bits ^ _MAGNITUDE))

    def how_many(test):
        def add(i, sums):
            hits = jnp.where(test(keys_ref[chunk(i), :]), 1, 0)
            return sums + hits.reshape(-1, _SUBLANES, _LANES).sum(axis=0)

        sums = lax.fori_loop(0, chunks, add, jnp.zeros((_SUBLANES, _LANES), jnp.int32))
        return _total(sums.astype(jnp.float32)).astype(jnp.int32)  # [1, 1]; exact to 2^24

    def refine(i, t):
        """The largest t with at least `count` keys >= t, one bit a pass, from the lowest int32 up."""
        candidate = t ^ lax.shift_right_logical(_SIGN, i)
        return jnp.where(how_many(lambda keys: keys >= candidate) >= count, candidate, t)

    lax.fori_loop(0, chunks, order, None)
    threshold = lax.fori_loop(0, 32, refine, jnp.full((1, 1), _SIGN))
    missing = (count - how_many(lambda keys: keys > threshold)).astype(jnp.float32)

    def rank(i, before):
        keys = keys_ref[chunk(i), :]
        above, tied = (jnp.where(x, 1.0, 0.0) for x in (keys > threshold, keys == threshold))
        above_to, tied_to = before[0] + _running(above), before[1] + _running(tied)  # [rows, 128]
        chosen = (keys > threshold) | ((keys == threshold) & (tied_to <= missing))
        visit(chunk(i), chosen, (above_to + jnp.minimum(tied_to, missing)).astype(jnp.int32))
        return before[0] + _total(above), before[1] + _total(tied)

    lax.fori_loop(0, chunks, rank, (jnp.zeros((1, 1)), jnp.zeros((1, 1))))


def _running(x):
    """The running sum of zeros and ones [rows, 128] in flat order, inclusive, as products with triangles of ones.

    Exact: bfloat16 holds 0 to 256, a row adds up to at most 128, and the products are summed in float32.
    """

    def product(a, b):
        return lax.dot_general(
            a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    def triangle(n, test):
        row, column = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
        return jnp.where(test(row, column), 1.0, 0.0)

    within = product(x, triangle(_LANES, lambda i, j: i <= j))
    row_sums = product(x, jnp.ones((_LANES, _LANES)))  # the same in every lane
    return within + product(triangle(x.shape[0], lambda i, j: j < i), row_sums)


def _move(here, there, bit: int):
    """An element of `there` with the bit set moves in, one of `here` with the bit set has moved out."""
    return jnp.where(there >> bit & 1 == 1, there, jnp.where(here >> bit & 1 == 1, 0, here))


def _shift(x, places: int):
    """x [rows, 128] moved by `places` in flat order, to later places; 0 comes in."""
    if places < _LANES:
        rolled = pltpu.roll(x, places, 1)
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        rolled = jnp.where(lane < places, pltpu.roll(rolled, 1, 0), rolled)
    else:
        rolled = pltpu.roll(x, places // _LANES, 0)
    return jnp.where(_flat(x.shape, 0) < places, 0, rolled)


def _flat(shape, first_row):
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (first_row + row) * _LANES + lane


def _total(x):
    return x.sum(axis=0, keepdims=True).sum(axis=1, keepdims=True)  # [1, 1]
