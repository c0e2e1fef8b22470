"""`window_scores` on a TPU: one pass over the keys, with the logits of one KV head kept in VMEM.

    k [B, K, T, D]  in HBM     |tile 0|tile 1|tile 2|...      one tile a grid step, fetched while the last one is used
    logits [G*W, T] in VMEM    |chunk|chunk|chunk|...         with their running maximum and sum (online softmax)
    summed [G, T]   in VMEM    exp(logits - maximum) / sum, added over the W queries of each head
    out    [1, T]              pooled per head, added over the heads of the group

The softmax is the online one of Milakov & Gimelshein (arXiv 1805.02867). Where the logits do not fit in VMEM, the keys
are read twice instead and the logits computed again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arithmetic import round_up
from kernels_pallas.dispatch import tpu_interpret

_LANES, _SUBLANES = 128, 8
_VMEM_LIMIT = 56 << 20  # v5p and tpu7x have 64 MiB a core, v5e and v6e 128; the compiler needs a little itself
_KEPT_LIMIT = 32 << 20  # of which the logits may take this much


@dataclasses.dataclass(frozen=True)
class Tiles:
    keys: int  # per grid step: what one copy from HBM brings
    chunk: int  # per turn of the inner loop, a divisor of keys
    keep: bool  # the logits stay in VMEM


def tiles_for(rows: int, tokens: int, dim: int, itemsize: int) -> Tiles:
    """`rows` = G*W queries share a KV head.

    chunk: rows * chunk float32 logits are 32 vector registers, half of what a core has.
    keys: 2 MiB, 2.5 us of HBM time on v5e and 0.6 us on tpu7x: a grid step costs about 0.35 us besides.
    """
    chunk = {32: 1024, 64: 512, 128: 256}.get(max(32, pl.next_power_of_2(rows)), 128)
    chunk = min(chunk, round_up(tokens, _LANES))
    keys = (2 << 20) // (round_up(dim, _LANES) * itemsize) // chunk * chunk
    keys = min(keys, round_up(tokens, chunk))
    return Tiles(keys, chunk, keep=rows * round_up(tokens, keys) * 4 <= _KEPT_LIMIT)


def window_scores(q, k, start, stop, *, kernel_size, pooling, interpret=False, tiles: Tiles | None = None):
    batch, heads, window, dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    group, padded_window = heads // kv_heads, round_up(window, _SUBLANES)
    rows = group * padded_window
    tiles = tiles or tiles_for(rows, tokens, dim, k.dtype.itemsize)
    steps = pl.cdiv(tokens, tiles.keys)
    columns = steps * tiles.keys
    halo = round_up(kernel_size // 2, _LANES)

    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded_window - window), (0, 0))).reshape(batch, kv_heads, rows, dim)

    def key_tile(b, h, sweep, tile, start, stop):
        """Tiles without a valid column repeat their neighbour's index, which fetches nothing."""
        first, last = lax.div(start[b], tiles.keys), lax.div(jnp.maximum(stop[b] - 1, 0), tiles.keys)
        return b, h, jnp.minimum(jnp.maximum(tile, first), last), 0

    out = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, window=window, kernel_size=kernel_size, pooling=pooling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, 1 if tiles.keep else 2, steps),
            in_specs=[
                pl.BlockSpec((None, None, rows, dim), lambda b, h, *_: (b, h, 0, 0)),
                pl.BlockSpec((None, None, tiles.keys, dim), key_tile),
            ],
            out_specs=pl.BlockSpec((None, None, 1, columns), lambda b, h, *_: (b, h, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((columns // tiles.chunk if tiles.keep else 1, rows, tiles.chunk), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((group, columns + 2 * halo), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, 1, columns), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        interpret=tpu_interpret(interpret),
        name="window_scores",
    )(start, stop, q, k)
    return out.reshape(batch, kv_heads, columns)[..., :tokens]


def _kernel(
    # Scalars
    start_ref,  # [B]
    stop_ref,  # [B]
    # Inputs
    q_ref,  # [G*W, D]
    k_ref,  # [keys, D]
    # Output
    out_ref,  # [1, columns]
    # Scratch, kept over the tiles of one KV head
    logits_ref,  # [columns / chunk, G*W, chunk]; unused if not tiles.keep
    most_ref,  # [G*W, 1] running maximum
    total_ref,  # [G*W, 1] running sum of exp(logits - maximum)
    summed_ref,  # [G, halo + columns + halo]
    *,
    tiles: Tiles,
    window: int,
    kernel_size: int,
    pooling: str,
):
    b, sweep, tile = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    sweeps, steps = pl.num_programs(2), pl.num_programs(3)
    start, stop = start_ref[b], stop_ref[b]
    rows, dim = q_ref.shape
    group, columns = summed_ref.shape[0], out_ref.shape[1]
    halo, per_tile = (summed_ref.shape[1] - columns) // 2, tiles.keys // tiles.chunk
    base = tile * per_tile  # the tile's first chunk

    def visible(visit, first, chunks):
        """Calls `visit` with every chunk of first .. first + chunks that has a valid column."""
        lower = jnp.maximum(first, lax.div(start, tiles.chunk))
        upper = jnp.minimum(first + chunks, lax.div(stop + tiles.chunk - 1, tiles.chunk))
        lax.fori_loop(lower, upper, lambda chunk, _: visit(chunk), None)

    def logits_of(chunk):  # [G*W, chunk], -inf where the query does not see the key
        keys = k_ref[pl.ds(pl.multiple_of((chunk - base) * tiles.chunk, tiles.chunk), tiles.chunk), :]
        precision = lax.Precision.HIGHEST if keys.dtype == jnp.float32 else lax.Precision.DEFAULT
        logits = lax.dot_general(
            q_ref[...], keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        column = chunk * tiles.chunk + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        w = lax.rem(lax.broadcasted_iota(jnp.int32, logits.shape, 0), rows // group)
        seen = (column >= start) & (column <= stop - window + w) & (w < window)
        return jnp.where(seen, logits * dim**-0.5, -jnp.inf)

    def measure(chunk):
        logits = logits_of(chunk)
        if tiles.keep:
            logits_ref[chunk] = logits
        before, here = most_ref[...], logits.max(axis=1, keepdims=True)
        most = jnp.maximum(before, here)
        finite = _finite(most)
        total_ref[...] = total_ref[...] * jnp.exp(before - finite) + jnp.exp(logits - finite).sum(axis=1, keepdims=True)
        most_ref[...] = most

    def add_up(chunk):
        logits = logits_ref[chunk] if tiles.keep else logits_of(chunk)
        total = total_ref[...]
        weights = jnp.exp(logits - _finite(most_ref[...])) / jnp.where(total > 0, total, 1.0)  # no key seen: all 0
        summed = weights.reshape(group, rows // group, tiles.chunk).sum(axis=1)
        column = chunk * tiles.chunk + lax.broadcasted_iota(jnp.int32, summed.shape, 1)
        place = pl.multiple_of(halo + chunk * tiles.chunk, _LANES)
        summed_ref[:, pl.ds(place, tiles.chunk)] = jnp.where(column < stop - window, summed, 0.0)

    def pool(chunk):
        around = summed_ref[:, pl.ds(pl.multiple_of(chunk * tiles.chunk, _LANES), tiles.chunk + 2 * halo)]
        pooled = _pool(around, kernel_size, pooling)[:, halo : halo + tiles.chunk]
        here = pl.ds(pl.multiple_of(chunk * tiles.chunk, tiles.chunk), tiles.chunk)
        out_ref[:, here] = pooled.sum(axis=0, keepdims=True)

    @pl.when((sweep == 0) & (tile == 0))
    def _():
        most_ref[...] = jnp.full_like(most_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        summed_ref[...] = jnp.zeros_like(summed_ref)

    @pl.when(sweep == 0)
    def _():
        visible(measure, base, per_tile)

    if not tiles.keep:

        @pl.when(sweep == 1)
        def _():
            visible(add_up, base, per_tile)

    @pl.when((sweep == sweeps - 1) & (tile == steps - 1))
    def _():
        if tiles.keep:
            visible(add_up, 0, columns // tiles.chunk)
        lax.fori_loop(0, columns // tiles.chunk, lambda chunk, _: pool(chunk), None)


def _pool(x, kernel_size: int, pooling: str):
    """Pooling centred on each lane; a box of 2^i is two boxes of 2^(i-1), so log2(kernel_size) turns. x >= 0."""
    join = jnp.maximum if pooling == "max" else jnp.add
    box, done, pooled = x, 0, jnp.zeros_like(x)
    for bit in range(kernel_size.bit_length()):  # box covers the 2^bit lanes from each on, pooled `done` of them
        if kernel_size >> bit & 1:
            pooled = join(pooled, _shift(box, -done))
            done += 1 << bit
        if kernel_size >> bit > 1:
            box = join(box, _shift(box, -(1 << bit)))
    pooled = _shift(pooled, kernel_size // 2)
    return pooled if pooling == "max" else pooled / kernel_size


def _shift(x, lanes: int):
    """x moved to the right by `lanes`; what falls off the end comes back in front, in the halo."""
    return pltpu.roll(x, lanes % x.shape[1], 1) if lanes else x


def _finite(most):
    return jnp.where(most == -jnp.inf, 0.0, most)
