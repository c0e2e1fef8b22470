"""The KV cache as a pytree: frozen prompt entries per run of layers, and one small buffer for decoded tokens."""

from typing import NamedTuple

import jax
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class SegmentKV:
    """Prompt entries of a run of layers [first, first + L'), written once by prefill.

    Rows are right-aligned: a head that keeps fewer than C entries has its empty slots first.

        slot        0   1   2   3   4
        positions  -1  -1   0  17  18      three kept of C = 5
    """

    k: Float[Array, "L B N C D"]
    v: Float[Array, "L B N C D"]
    positions: Int[Array, "L B N C"]  # where each entry stood in the prompt, -1 = empty


class LayerKV(NamedTuple):
    """Prompt entries of one layer."""

    k: Float[Array, "B N C D"]
    v: Float[Array, "B N C D"]
    positions: Int[Array, "B N C"]


@struct.dataclass
class KVCache:
    """Everything decoding needs. Donated to, and returned by, every decode step."""

    segments: tuple[SegmentKV, ...]
    k_new: Float[Array, "L B K M D"]  # decoded tokens, appended in step order
    v_new: Float[Array, "L B K M D"]
    used: Int[Array, ""]  # filled slots of the buffer, the same for every row
    position: Int[Array, " B"]  # true position of each row's next token

    @property
    def max_new_tokens(self) -> int:
        """Slots for decoded tokens (M)."""
        return self.k_new.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the empty slots included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def layer(self, index: int) -> LayerKV:
        """Prompt entries of layer `index`."""
        first = 0
        for segment in self.segments:
            if first <= index < first + segment.k.shape[0]:
                i = index - first
                return LayerKV(segment.k[i], segment.v[i], segment.positions[i])
            first += segment.k.shape[0]
        raise IndexError(f"layer {index} is outside 0..{first - 1}")
