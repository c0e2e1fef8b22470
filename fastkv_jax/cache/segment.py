"""What a prompt leaves in a run of layers: its entries, by head or flat, in the model's numbers or in 8 bits."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fastkv_jax.cache.select import choose
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.model.sharding import DATA, MODEL, spec
from kernels_pallas import Slots, quantize
from kernels_pallas.gpu_backend import fits_offsets


@struct.dataclass
class SegmentKV:
    """Prompt entries of a run of layers [first, first + L'), written once by prefill.

    Rows are right-aligned: a head that keeps fewer than C entries has its empty slots first.

        slot        0   1   2   3   4
        positions  -1  -1   0  17  18      three kept of C = 5

    In a flat cache (`sharing` = K > 0) the heads of a layer share the slots, N = 1, one head after the other, and a
    slot's code says whose it is: position * K + head. In a cache of 8 bits, k and v are values to be multiplied by
    the scale of their slot.
    """

    k: Float[Array, "L B N C D"]
    v: Float[Array, "L B N C D"]
    positions: Int[Array, "L B N C"]  # where each entry stood in the prompt (flat: its code), -1 = empty
    k_scale: Float[Array, "L B N C"] | None = None
    v_scale: Float[Array, "L B N C"] | None = None
    sharing: int = struct.field(pytree_node=False, default=0)

    @property
    def heads(self) -> Int[Array, "*L B 1 C"] | None:
        """The KV head of each slot of a flat cache, else None."""
        return self.positions % self.sharing if self.sharing else None

    def slots(self) -> Slots:
        """What decode attention reads."""
        return Slots(self.k, self.v, self.positions, self.heads, self.k_scale, self.v_scale)

    def each(self, change: Callable[..., Array], *others: "SegmentKV") -> "SegmentKV":
        """change(array, what it holds in an empty slot, *the others' arrays) for every array that there is."""
        scales = [None if a is None else 0 for a in (self.k_scale, self.v_scale)]
        return jax.tree.map(change, self, SegmentKV(0, 0, -1, *scales, self.sharing), *others)  # pyright: ignore

    def flat(self, kv_heads: int) -> "SegmentKV":
        """The same entries in a flat cache; the heads must be the K KV heads."""
        if self.sharing:
            return self
        if self.k.shape[-3] != kv_heads:
            raise InputError(f"a cache of {self.k.shape[-3]} heads cannot be joined with one that {kv_heads} share")
        head = jnp.arange(kv_heads).reshape((1,) * (self.positions.ndim - 2) + (kv_heads, 1))
        codes = jnp.where(self.positions >= 0, self.positions * kv_heads + head, -1)
        k, v = (a.reshape(*a.shape[:-3], 1, -1, a.shape[-1]) for a in (self.k, self.v))
        k_scale, v_scale = (None if a is None else _in_one_row(a) for a in (self.k_scale, self.v_scale))
        return SegmentKV(k, v, _in_one_row(codes), k_scale, v_scale, kv_heads)

    def extended(self, other: "SegmentKV", kv_heads: int) -> "SegmentKV":
        """The slots of both, these first. Where one is flat, per query head, or of 8 bits, the other becomes so."""
        one, two = (self.flat(kv_heads), other.flat(kv_heads)) if self.sharing or other.sharing else (self, other)
        one, two = one.quantized_as(two), two.quantized_as(one)
        heads = max(one.k.shape[-3], two.k.shape[-3])

        def join(a: Array | None, b: Array | None, axis: int) -> Any:
            if a is None or b is None:
                return None
            a, b = (jnp.repeat(x, heads // x.shape[axis], axis=axis) for x in (a, b))
            return jnp.concatenate([a, b], axis=axis + 1)

        k, v, positions = join(one.k, two.k, -3), join(one.v, two.v, -3), join(one.positions, two.positions, -2)
        scales = join(one.k_scale, two.k_scale, -2), join(one.v_scale, two.v_scale, -2)
        return SegmentKV(k, v, positions, *scales, one.sharing)

    def quantized(self, dtype: jax.typing.DTypeLike) -> "SegmentKV":
        """The same entries in 8 bits: int8 or float8_e4m3fn."""
        (k, k_scale), (v, v_scale) = quantize(self.k, dtype), quantize(self.v, dtype)
        return dataclasses.replace(self, k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def quantized_as(self, other: "SegmentKV") -> "SegmentKV":
        """Of 8 bits if the other is."""
        return self.quantized(other.k.dtype) if self.k_scale is None and other.k_scale is not None else self

    def dequantized(self, dtype: jax.typing.DTypeLike) -> "SegmentKV":
        """The entries as numbers of their own."""
        if self.k_scale is None or self.v_scale is None:
            return self
        k, v = (
            (a.astype(jnp.float32) * s.astype(jnp.float32)[..., None]).astype(dtype)
            for a, s in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        return SegmentKV(k, v, self.positions, sharing=self.sharing)

    def widened(self, slots: int) -> "SegmentKV":
        """Empty slots added in front, up to `slots`; arrays [L, B, N, C, ...]."""

        if slots == self.k.shape[3]:
            return self

        def pad(a: Array, fill: int) -> Array:
            widths = [(0, 0)] * a.ndim
            widths[3] = (slots - a.shape[3], 0)
            return jnp.pad(a, widths, constant_values=fill)

        return self.each(pad)

    def in_runs(self, mesh: Mesh | None) -> list["SegmentKV"]:
        """Itself, or the fewest runs of its layers in which a GPU's kernels find every entry, each device its own."""
        layers, *one = self.k.shape
        parts = [] if mesh is None else [mesh.shape[axis] for axis in spec(mesh, tuple(one), DATA, MODEL) if axis]
        elements = math.prod(one) // math.prod(parts)
        edges = [0, *accumulate(runs_of(layers, elements, self.k.dtype.itemsize))]
        if len(edges) == 2:
            return [self]
        return [jax.tree.map(lambda a, i=i, j=j: a[i:j], self) for i, j in pairwise(edges)]

    def by_head(self) -> "SegmentKV":
        """A flat cache as one with a row for each KV head, which costs K times the memory: for people and tests."""
        if not self.sharing:
            return self
        owner = self.positions % self.sharing
        mine = (owner == jnp.arange(self.sharing)[None, None, :, None]) & (self.positions >= 0)  # [L, B, K, C]
        counts = mine.sum(axis=-1, dtype=jnp.int32)
        chosen = choose(jnp.where(mine, 0.0, -jnp.inf), counts, mine.shape[-1])
        spread = lambda a: jnp.broadcast_to(a, (*mine.shape[:3], *a.shape[3:]))  # noqa: E731
        k, v = (chosen.take(spread(a), 0) for a in (self.k, self.v))
        codes = chosen.take(spread(self.positions), -1)
        return SegmentKV(k, v, jnp.where(codes >= 0, codes // self.sharing, -1))


def runs_of(layers: int, elements: int, itemsize: int) -> list[int]:
    """How many layers go into each of the fewest runs in which a GPU's kernels find every entry.

    `elements`: keys of one layer on one device, in numbers of `itemsize` bytes. Raises `FastKVConfigError` if no run
    is right.
    """
    for count in range(1, layers + 1):
        sizes = [layers // count + (i < layers % count) for i in range(count)]
        if all(fits_offsets(size * elements, itemsize) for size in sizes):
            return sizes
    raise FastKVConfigError(
        f"kv_dtype of 8 bits: a layer's keys are {elements:,} numbers, and of one byte each a GPU's kernels find them "
        f"up to 2^31 and beyond 2^32 only; use a smaller batch, or entries in the model's own numbers"
    )


def joined(segments: Sequence[SegmentKV]) -> SegmentKV:
    """Runs of layers as one, empty slots added in front of the shorter ones."""
    slots = max(segment.k.shape[3] for segment in segments)
    return _concatenated([segment.widened(slots) for segment in segments])


@jax.jit
def _concatenated(segments: list[SegmentKV]) -> SegmentKV:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *segments)


def _in_one_row(a: Array) -> Array:
    return a.reshape(*a.shape[:-2], 1, -1)
