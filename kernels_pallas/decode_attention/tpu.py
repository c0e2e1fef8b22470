"""`decode_attention` on a TPU: one kernel that streams keys and values once, all heads of a row in each grid step.

    k, v [L, B, N, C, D] in HBM  |tile 0|tile 1|...    N heads * `slots` entries a grid step, fetched ahead
    q    [N, H/N, D]  in VMEM    the queries of a row, grouped by the cache head they look at
    out  [N, H/N, D]  in VMEM    running weighted sum, with its maximum and the sum of its weights

The online softmax is Milakov & Gimelshein's (arXiv 1805.02867), its use on tiles FlashAttention's (arXiv 2205.14135).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arithmetic import product, round_up
from kernels_pallas.decode_attention.parts import Slots, attend_to_both, mixed_in
from kernels_pallas.dispatch import tpu_interpret

_LANES = 128
_VMEM_LIMIT = 56 << 20  # v5p and tpu7x have 64 MiB a core, v5e and v6e 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    slots: int  # per grid step, of each of the N heads


def tiles_for(heads: int, slots: int, dim: int, itemsize: int) -> Tiles:
    """1 MiB of keys and as much of values: 2.6 us of HBM time on v5e and 0.6 us on tpu7x; a grid step costs about 0.35.

    Larger tiles only make the program longer: a step's products are unrolled over heads and registers.
    """
    fit = (1 << 20) // (heads * round_up(dim, _LANES) * itemsize)
    return Tiles(max(_LANES, min(fit, 4096, slots + _LANES - 1) // _LANES * _LANES))


def decode_attention(q, prompt: Slots, new: Slots, filled, layer, *, interpret=False, tiles=None):
    attend = functools.partial(_attend, interpret=interpret, tiles=tiles)
    return attend_to_both(attend, q, prompt, new, filled, layer)


def _attend(q, slots: Slots, layer, used, group: int, *, interpret: bool, tiles: Tiles | None):
    batch, query_heads, dim = q.shape
    heads, capacity = slots.k.shape[2:4]
    rows = query_heads // heads
    tiles = tiles or tiles_for(heads, capacity, dim, slots.k.dtype.itemsize)
    steps = pl.cdiv(capacity, tiles.slots)

    def place(b, step, layer, used):
        """Tiles behind the last used slot repeat its tile's index, which fetches nothing."""
        return layer[0], b, 0, jnp.minimum(step, lax.div(jnp.maximum(used[b] - 1, 0), tiles.slots))

    entries = pl.BlockSpec((None, None, heads, tiles.slots, dim), lambda *at: (*place(*at), 0))
    numbers = pl.BlockSpec((None, None, heads, tiles.slots), place)
    of_row = lambda *shape: pl.BlockSpec((None, *shape), lambda b, *_: (b, 0, 0, 0))  # noqa: E731
    out, log_sum_exp = pl.pallas_call(
        functools.partial(_kernel, group=group, capacity=capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, steps),
            in_specs=[
                of_row(heads, rows, dim),
                Slots(entries, entries, *(None if x is None else numbers for x in slots[2:])),
            ],
            out_specs=[of_row(heads, rows, dim), of_row(heads, rows, 1)],
            scratch_shapes=[pltpu.VMEM((heads, rows, 1), jnp.float32), pltpu.VMEM((heads, rows, 1), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        interpret=tpu_interpret(interpret),
        name="decode_attention",
    )(layer.reshape(1), used, q.reshape(batch, heads, rows, dim), slots)
    return out.reshape(batch, query_heads, 1, dim), log_sum_exp.reshape(batch, query_heads, 1)


def _kernel(
    # Scalars
    _,  # [1] the layer, which the blocks' places have looked at
    used_ref,  # [B]
    # Inputs
    q_ref,  # [N, H/N, D]
    slots: Slots,  # k, v [N, slots, D]; positions, heads, k_scale, v_scale [N, slots] or None
    # Outputs
    out_ref,  # [N, H/N, D]; until the last tile, the weighted sum
    log_sum_exp_ref,  # [N, H/N, 1]
    # Scratch, kept over the tiles of a row
    most_ref,  # [N, H/N, 1] running maximum of the logits
    total_ref,  # [N, H/N, 1] running sum of exp(logits - maximum)
    *,
    group: int,
    capacity: int,
):
    step, used = pl.program_id(1), used_ref[pl.program_id(0)]
    size, dim = slots.k.shape[1:]

    @pl.when(step == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        most_ref[...] = jnp.full_like(most_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(step * size < used)
    def _():
        logits = product(q_ref[...], slots.k[...].astype(q_ref.dtype), 2, batched=1) * dim**-0.5  # [N, H/N, slots]
        if slots.k_scale is not None:
            logits *= slots.k_scale[...].astype(jnp.float32)[:, None]
        there = step * size + lax.broadcasted_iota(jnp.int32, logits.shape, 2) < used
        if slots.positions is not None:
            there &= slots.positions[...][:, None] >= 0
        if slots.heads is not None:
            there &= slots.heads[...][:, None] == lax.div(lax.broadcasted_iota(jnp.int32, logits.shape, 1), group)
        logits = jnp.where(there, logits, -jnp.inf)

        before = most_ref[...]
        most = jnp.maximum(before, logits.max(axis=2, keepdims=True))
        finite = jnp.where(most == -jnp.inf, 0.0, most)
        weights, fade = jnp.exp(logits - finite), jnp.exp(before - finite)
        most_ref[...] = most
        total_ref[...] = total_ref[...] * fade + weights.sum(axis=2, keepdims=True)

        if slots.v_scale is not None:
            weights = jnp.where(there, weights * slots.v_scale[...].astype(jnp.float32)[:, None], 0.0)
        dtype = mixed_in(q_ref.dtype, slots)
        values = slots.v[...].astype(dtype)
        if capacity % size:  # behind the end of the array stands anything, and 0 * NaN is NaN
            slot = step * size + lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values = jnp.where(slot < capacity, values, jnp.zeros_like(values))
        out_ref[...] = out_ref[...] * fade + product(weights.astype(dtype), values, 1, batched=1)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        total = total_ref[...]
        out_ref[...] = out_ref[...] / jnp.where(total > 0, total, 1.0)
        log_sum_exp_ref[...] = most_ref[...] + jnp.log(total)  # -inf where nothing was seen
