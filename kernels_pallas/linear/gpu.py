"""`linear` on a GPU: the matrix streams through the multiprocessors once, in tiles of whole rows' pieces.

weight [L, O, I]     | rows of the output, a tile each |  x  | splits of I, where the tiles are too few |
out    [splits, B, O] float32, added up afterwards
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gpu_backend import gpu_call, triton

_DOT = 16  # tensor cores multiply no smaller matrices
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


@dataclasses.dataclass(frozen=True)
class Tiles:
    out: int  # rows of the matrix in one program, a power of two
    inner: int  # a turn of the loop, a power of two
    splits: int  # of I


def tiles_for(out: int, inner: int, itemsize: int) -> Tiles:
    """16 rows of 512 bytes a turn, four turns in flight: 8 MiB on the whole chip, more than its latency hides."""
    width = max(_DOT, 512 // itemsize)
    splits = max(1, min(pl.cdiv(_PROGRAMS, pl.cdiv(out, _DOT)), inner // (4 * width)))
    return Tiles(_DOT, width, splits)


def linear(x, weight, layer, *, interpret=False, tiles: Tiles | None = None):
    batch, inner = x.shape
    out = weight.shape[1]
    tiles = tiles or tiles_for(out, inner, weight.dtype.itemsize)
    blocks = pl.cdiv(batch, _DOT)
    x = jnp.pad(x, ((0, blocks * _DOT - batch), (0, 0)))
    parts = gpu_call(
        functools.partial(_kernel, tiles=tiles),
        name="linear",
        grid=(pl.cdiv(out, tiles.out), blocks, tiles.splits),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, blocks * _DOT, out), jnp.float32),
        warps=4,
        stages=4,
        interpret=interpret,
    )(layer.reshape(1), x, weight)
    return parts.sum(axis=0)[:batch].astype(x.dtype)


def _kernel(
    # Inputs
    layer_ref,  # [1]
    x_ref,  # [B, I], B up to whole tiles
    weight_ref,  # [L, O, I]
    # Output
    out_ref,  # [splits, B, O]
    *,
    tiles: Tiles,
):
    layer, split = layer_ref[0], pl.program_id(2)
    row = pl.program_id(0) * tiles.out + jnp.arange(tiles.out)
    batch = pl.program_id(1) * _DOT + jnp.arange(_DOT)
    _, out, inner = weight_ref.shape
    steps = pl.cdiv(pl.cdiv(inner, tiles.inner), tiles.splits)  # of one split

    def turn(step, total):
        column = (split * steps + step) * tiles.inner + jnp.arange(tiles.inner)
        inside = (column < inner)[None]
        weights = triton().load(
            weight_ref.at[layer, row[:, None], column[None]], mask=(row < out)[:, None] & inside, other=0
        )
        x = triton().load(
            x_ref.at[batch[:, None], column[None]], mask=jnp.broadcast_to(inside, (_DOT, tiles.inner)), other=0
        )
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
        dims = (((1,), (1,)), ((), ()))
        return total + lax.dot_general(x, weights, dims, precision=precision, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, steps, turn, jnp.zeros((_DOT, tiles.out)))
    triton().store(
        out_ref.at[split, batch[:, None], row[None]], total, mask=jnp.broadcast_to((row < out)[None], total.shape)
    )
