"""The KV cache as a pytree: frozen prompt entries per run of layers, and one small buffer for decoded tokens."""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from fastkv_jax.errors import InputError
from fastkv_jax.select import choose
from kernels_pallas import quantize


class LayerKV(NamedTuple):
    """Prompt entries of one layer, by KV head."""

    k: Float[Array, "B N C D"]
    v: Float[Array, "B N C D"]
    positions: Int[Array, "B N C"]


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

    def flat(self, kv_heads: int) -> "SegmentKV":
        """The same entries in a flat cache; the heads must be the K KV heads."""
        if self.sharing:
            return self
        if self.k.shape[-3] != kv_heads:
            raise InputError(f"a cache of {self.k.shape[-3]} heads cannot be joined with one that {kv_heads} share")
        codes = jnp.where(self.positions >= 0, self.positions * kv_heads + jnp.arange(kv_heads)[:, None], -1)
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

        def pad(a: Array, fill: int) -> Array:
            widths = [(0, 0)] * a.ndim
            widths[3] = (slots - a.shape[3], 0)
            return jnp.pad(a, widths, constant_values=fill)

        empty = {"positions": -1}
        values = {f: getattr(self, f) for f in ("k", "v", "positions", "k_scale", "v_scale")}
        padded = {f: pad(a, empty.get(f, 0)) for f, a in values.items() if a is not None}
        return self if slots == self.k.shape[3] else dataclasses.replace(self, **padded)

    def by_head(self) -> "SegmentKV":
        """A flat cache as one with a row for each KV head, which costs K times the memory: for people and tests."""
        if not self.sharing:
            return self
        owner = self.positions % self.sharing
        mine = (owner == jnp.arange(self.sharing)[:, None]) & (self.positions >= 0)  # [L, B, K, C]
        counts = mine.sum(axis=-1, dtype=jnp.int32)
        chosen = choose(jnp.where(mine, 0.0, -jnp.inf), counts, mine.shape[-1])
        spread = lambda a: jnp.broadcast_to(a, (*mine.shape[:3], *a.shape[3:]))  # noqa: E731
        k, v = (chosen.take(spread(a), 0) for a in (self.k, self.v))
        codes = chosen.take(spread(self.positions), -1)
        return SegmentKV(k, v, jnp.where(codes >= 0, codes // self.sharing, -1))


@struct.dataclass
class KVCache:
    """Everything decoding needs. Donated to, and returned by, every decode step."""

    segments: tuple[SegmentKV, ...]
    k_new: Float[Array, "L B K M D"]  # decoded tokens, appended in step order
    v_new: Float[Array, "L B K M D"]
    used: Int[Array, ""]  # the slot that the next token goes to, the same for every row
    filled: Int[Array, " B"]  # slots that count; fewer than `used` in a row that ended before others
    position: Int[Array, " B"]  # true position of each row's next token

    @classmethod
    def empty_after(
        cls,
        segments: tuple[SegmentKV, ...],
        position: Int[Array, " B"],
        max_new_tokens: int,
        kv_heads: int,
        dtype: jax.typing.DTypeLike,
    ) -> "KVCache":
        """Prompt entries, and a buffer of the model's dtype with room for new tokens."""
        layers, k = sum(segment.k.shape[0] for segment in segments), segments[0].k
        shape = (layers, k.shape[1], kv_heads, max_new_tokens, k.shape[-1])
        used, filled = jnp.zeros((), jnp.int32), jnp.zeros(position.shape, jnp.int32)
        return cls(segments, jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), used, filled, position)

    @property
    def max_new_tokens(self) -> int:
        """Slots for decoded tokens (M)."""
        return self.k_new.shape[3]

    @property
    def num_layers(self) -> int:
        """Layers (L)."""
        return self.k_new.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the empty slots included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def entry_bytes(self) -> np.ndarray:
        """[B] bytes of the K and V, with their scales, of the prompt entries that each row keeps."""
        total = np.zeros(self.position.shape[0], np.int64)
        for segment in self.segments:
            scale = 0 if segment.k_scale is None else segment.k_scale.dtype.itemsize
            slot = 2 * (segment.k.shape[-1] * segment.k.dtype.itemsize + scale)
            total += np.asarray((segment.positions >= 0).sum(axis=(0, 2, 3))) * slot
        return total

    @property
    def edges(self) -> tuple[int, ...]:
        """Where a run of layers ends and the next begins, 0 and L included."""
        return tuple(accumulate((segment.k.shape[0] for segment in self.segments), initial=0))

    def run(self, first: int, stop: int) -> SegmentKV:
        """Entries of the layers [first, stop), which lie in one segment."""
        for segment, begin, end in zip(self.segments, self.edges, self.edges[1:], strict=False):
            if begin <= first and stop <= end:
                mine = slice(first - begin, stop - begin)
                whole = (first, stop) == (begin, end)
                return segment if whole else jax.tree.map(lambda a, mine=mine: a[mine], segment)
        raise IndexError(f"layers {first}..{stop - 1} are not in one of the runs {self.edges}")

    def layer(self, index: int) -> LayerKV:
        """Prompt entries of layer `index`, a row for each cache head."""
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} is outside 0..{self.num_layers - 1}")
        one = self.run(index, index + 1).dequantized(self.k_new.dtype).by_head()
        return LayerKV(one.k[0], one.v[0], one.positions[0])

    def row(self, index: int) -> "KVCache":
        """The cache of one row of the batch."""
        return _row(self, index)

    def folded(self) -> "KVCache":
        """Decoded tokens as prompt entries; the buffer is left without slots."""
        if not isinstance(self.used, Tracer) and not int(self.used):
            return self
        return _fold(self)


def joined(segments: Sequence[SegmentKV]) -> SegmentKV:
    """Runs of layers as one, empty slots added in front of the shorter ones."""
    slots = max(segment.k.shape[3] for segment in segments)
    return _concatenated([segment.widened(slots) for segment in segments])


@jax.jit
def _concatenated(segments: list[SegmentKV]) -> SegmentKV:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *segments)


def _in_one_row(a: Array) -> Array:
    return a.reshape(*a.shape[:-2], 1, -1)


@jax.jit
def _row(cache: KVCache, index) -> KVCache:
    one = lambda a, axis=1: lax.dynamic_slice_in_dim(a, index, 1, axis)  # noqa: E731
    segments, k_new, v_new = jax.tree.map(one, (cache.segments, cache.k_new, cache.v_new))
    return KVCache(segments, k_new, v_new, cache.used, one(cache.filled, 0), one(cache.position, 0))


@jax.jit
def _fold(cache: KVCache) -> KVCache:
    slots = jnp.arange(cache.max_new_tokens)
    first = (cache.position - cache.filled)[:, None]
    positions = jnp.where(slots < cache.filled[:, None], first + slots, -1)  # [B, M]
    shape = cache.k_new.shape[:4]
    decoded = SegmentKV(cache.k_new, cache.v_new, jnp.broadcast_to(positions[:, None], shape))
    segments = tuple(
        segment.extended(jax.tree.map(lambda a, i=i, j=j: a[i:j], decoded), shape[2])
        for segment, i, j in zip(cache.segments, cache.edges, cache.edges[1:], strict=False)
    )
    return KVCache.empty_after(segments, cache.position, 0, shape[2], cache.k_new.dtype)
