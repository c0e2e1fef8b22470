"""Products with a layer's matrices on a GPU: they stream through the multiprocessors once, a tile of rows a program.

weights [L, O, I]    | tiles of the first | of the second | ...       a program each, over all of I
x       [B, I]       every program reads it from the L2 cache; rows that are not there are not fetched
out     [B, O]       norm, bias, gate and residual happen before it is written
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.arithmetic import product
from kernels_pallas.gpu_backend import gpu_call, triton

_DOT = 16  # tensor cores multiply no smaller matrices
_MULTIPROCESSORS = 132  # of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int  # of x, a power of two
    out: int  # rows of a matrix in one program, a power of two
    inner: int  # a turn of the loop, a power of two
    stages: int  # turns in flight


def tiles_for(batch: int, outs: Sequence[int], matrices: int, itemsize: int) -> Tiles:
    """Up to 16 rows: 512 bytes of 16 rows of a matrix, and of x, a turn, four turns in flight, two or three programs on
    a multiprocessor: 8 MiB on the whole chip, more than its latency hides. `matrices` that one program reads side by
    side take the place of a turn; with only one program for each multiprocessor more are in flight.

    With more rows tiles are twice as high, as every program reads all of x, and half as wide. What is in flight fits in
    any GPU's shared memory.
    """
    rows = max(_DOT, min(64, pl.next_power_of_2(batch)))
    out, width = (_DOT, 512) if rows == _DOT else (2 * _DOT, 256)
    alone = sum(pl.cdiv(size, out) for size in outs) <= _MULTIPROCESSORS
    stages = ((96 if alone else 72) << 10) // ((rows + matrices * out) * width)
    return Tiles(rows, out, max(_DOT, width // itemsize), max(2, min(6, stages)))


def products(x, norm, weights, biases, residual, layer, *, interpret=False, tiles: Tiles | None = None):
    """A tuple of x or norm(x) times each of the matrices, plus bias and residual."""
    outs = [weight.shape[1] for weight in weights]
    tiles = tiles or tiles_for(x.shape[0], outs, 1, x.dtype.itemsize)
    return _call("linear", x, norm, weights, biases, residual, layer, outs, tiles, interpret)


def gated(x, norm, gate, up, layer, *, interpret=False, tiles: Tiles | None = None):
    """silu of one product times the other."""
    outs = [gate.shape[1]]
    tiles = tiles or tiles_for(x.shape[0], outs, 2, x.dtype.itemsize)
    return _call("gated", x, norm, (gate, up), (None, None), None, layer, outs, tiles, interpret)[0]


def _call(name: str, x, norm, weights, biases, residual, layer, outs: list[int], tiles: Tiles, interpret: bool):
    edges = [0, *accumulate(pl.cdiv(size, tiles.out) for size in outs)]  # of tiles: where each result's begin
    return gpu_call(
        functools.partial(_kernel, tiles=tiles, edges=edges, eps=None if norm is None else norm.eps),
        name=name,
        grid=(edges[-1], pl.cdiv(x.shape[0], tiles.rows)),
        out_shape=tuple(jax.ShapeDtypeStruct((x.shape[0], size), x.dtype) for size in outs),
        warps=4,
        stages=tiles.stages,
        interpret=interpret,
    )(layer.reshape(1), x, None if norm is None else norm.weight, weights, biases, residual)


def _kernel(
    # Inputs
    layer_ref,  # [1]
    x_ref,  # [B, I]
    norm_ref,  # [L, I] or None
    weight_refs,  # [L, O, I] each
    bias_refs,  # [L, O] each or None
    residual_ref,  # [B, O] or None
    # Outputs
    *out_refs,  # [B, O] each: one for each matrix, or one for a gate and its other half
    tiles: Tiles,
    edges: list[int],
    eps: float | None,
):
    layer, tile = layer_ref[0], pl.program_id(0)
    batch = pl.program_id(1) * tiles.rows + jnp.arange(tiles.rows)

    def write(which: int) -> None:
        mine, bias_ref, out_ref = slice(which, which + 1), bias_refs[which], out_refs[which]
        mine = mine if len(out_refs) == len(weight_refs) else slice(None)
        row = (tile - edges[which]) * tiles.out + jnp.arange(tiles.out)
        totals = _sums(layer, x_ref, norm_ref, weight_refs[mine], batch, row, tiles, eps)
        total = totals[0] if len(totals) == 1 else jax.nn.silu(totals[0]) * totals[1]
        there = (batch < out_ref.shape[0])[:, None] & (row < out_ref.shape[1])[None]
        if bias_ref is not None:
            bias = triton().load(bias_ref.at[layer, row], mask=row < out_ref.shape[1], other=0)
            total += bias.astype(jnp.float32)[None]
        place = batch[:, None], row[None]
        if residual_ref is not None:
            total += triton().load(residual_ref.at[place], mask=there, other=0).astype(jnp.float32)
        triton().store(out_ref.at[place], total.astype(out_ref.dtype), mask=there)

    for which, (first, stop) in enumerate(pairwise(edges)):
        if len(edges) == 2:
            write(which)
        else:
            pl.when((first <= tile) & (tile < stop))(functools.partial(write, which))


def _sums(layer, x_ref, norm_ref, weight_refs, batch, row, tiles: Tiles, eps: float | None) -> list[Any]:
    """norm(x) times rows of each matrix, [rows, out] float32: the norm's weight on the way, 1 / rms at the end."""
    (rows, inner), out = x_ref.shape, weight_refs[0].shape[1]

    def turn(step, carry):
        squares, totals = carry
        column = step * tiles.inner + jnp.arange(tiles.inner)
        inside = column < inner

        def load(ref, *at, there):
            mask = there[:, None] & inside[None]
            return triton().load(ref.at[(*at, column[None])], mask=mask, other=0)

        x = load(x_ref, batch[:, None], there=batch < rows)
        if norm_ref is not None:
            x32 = x.astype(jnp.float32)
            squares += (x32 * x32).sum(axis=1)
            weight = triton().load(norm_ref.at[layer, column], mask=inside, other=0)
            x = (x32 * weight.astype(jnp.float32)[None]).astype(x.dtype)
        weights = [load(ref, layer, row[:, None], there=row < out) for ref in weight_refs]
        return squares, [total + product(x, w, 1) for total, w in zip(totals, weights, strict=True)]

    nothing = jnp.zeros(tiles.rows), [jnp.zeros((tiles.rows, tiles.out)) for _ in weight_refs]
    squares, totals = lax.fori_loop(0, pl.cdiv(inner, tiles.inner), turn, nothing)
    if eps is None:
        return totals
    scale = lax.rsqrt(squares / inner + eps)[:, None]
    return [total * scale for total in totals]
