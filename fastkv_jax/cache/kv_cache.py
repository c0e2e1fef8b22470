"""The KV cache as a pytree: frozen prompt entries per run of layers, and one small buffer for decoded tokens."""

from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fastkv_jax.cache.segment import SegmentKV


class LayerKV(NamedTuple):
    """Prompt entries of one layer, by KV head."""

    k: Float[Array, "B N C D"]
    v: Float[Array, "B N C D"]
    positions: Int[Array, "B N C"]


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

    def in_runs(self, mesh: Mesh | None = None) -> "KVCache":
        """The same with segments cut where a GPU's kernels would not find every entry; itself if they do."""
        segments = tuple(run for segment in self.segments for run in segment.in_runs(mesh))
        return self if len(segments) == len(self.segments) else self.replace(segments=segments)  # pyright: ignore

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


@jax.jit
def _row(cache: KVCache, index) -> KVCache:
    one = lambda a, axis=1: lax.dynamic_slice_in_dim(a, index, 1, axis)  # noqa: E731
    segments, k_new, v_new = jax.tree.map(one, (cache.segments, cache.k_new, cache.v_new))
    return KVCache(segments, k_new, v_new, cache.used, one(cache.filled, 0), one(cache.position, 0))


@jax.jit
def _fold(cache: KVCache) -> KVCache:
    slots = jnp.arange(cache.max_new_tokens)[None]
    first = (cache.position - cache.filled)[:, None]
    positions = jnp.where(slots < cache.filled[:, None], first + slots, -1)  # [B, M]
    shape = cache.k_new.shape[:4]
    decoded = SegmentKV(cache.k_new, cache.v_new, jnp.broadcast_to(positions[:, None], shape))
    segments = tuple(
        segment.extended(jax.tree.map(lambda a, i=i, j=j: a[i:j], decoded), shape[2])
        for segment, i, j in zip(cache.segments, cache.edges, cache.edges[1:], strict=False)
    )
    return KVCache.empty_after(segments, cache.position, 0, shape[2], cache.k_new.dtype)
