"""A method is a plan and a score.

The plan says, in Python integers, how many tokens enter each run of layers and how many entries each head keeps, for
every prompt length. The score says, in arrays, which. Nothing else in the package knows a method's name.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastkv_jax.model.ops import PLAIN, Ops


class Segment(NamedTuple):
    """A run of layers [first, stop), and its budgets as functions of the prompt length n (arrays over all n asked).

    The segments of a plan cover each layer once, in order. Where one starts again at layer 0, the prompt is read anew:
    the chosen tokens enter the model from the bottom, and what the layers before have kept is dropped.
    """

    first: int
    stop: int
    tokens: np.ndarray  # rows that enter the run
    kept: np.ndarray  # entries each cache head of the run keeps
    shared: bool = False  # the heads of a layer keep kept * K entries between them, in a flat cache
    renumbered: bool = False  # the rows that enter take the positions 0, 1, 2, ... instead of their own


class Layer(NamedTuple):
    """What a score may look at: the right-aligned rows that enter a layer, and what the layer makes of them.

    column      0   1   2   3   4   5   6   7
    positions  -1  -1   3   4   9  10  11  12      start 2, stop 7: one token of template follows the question
    """

    q: Float[Array, "B H S D"]  # rotated
    k: Float[Array, "B K S D"]  # rotated
    v: Float[Array, "B K S D"]
    positions: Int[Array, "B S"]  # where each row stood in the prompt, -1 = padding
    start: Int[Array, " B"]  # first valid column
    stop: Int[Array, " B"]  # the observation window ends before this column
    window: Int[Array, " B"]  # columns [stop - window, S) always stay
    kept: Int[Array, " B"]  # the exact budget of this layer's cache heads
    frequencies: Float[Array, " D/2"]  # rotary angle of each pair of dimensions, radians per position
    wo: Float[Array, "E H*D"]  # the layer's output projection
    ops: Ops = PLAIN  # window_scores and among_best as this platform runs them

    def protect(self, scores: Float[Array, "B *N S"]) -> Float[Array, "B *N S"]:
        """+inf for the window and what follows it, -inf for padding; a method's own +inf comes next to the window."""
        shape = (-1,) + (1,) * (scores.ndim - 1)
        columns = jnp.arange(scores.shape[-1]).reshape(shape[::-1])
        first = jnp.where(self.window > 0, self.stop - self.window, scores.shape[-1]).reshape(shape)
        scores = jnp.where(columns >= first, jnp.inf, jnp.minimum(scores, jnp.finfo(jnp.float32).max))
        return jnp.where(columns >= self.start.reshape(shape), scores, -jnp.inf)

    def last_queries(self, count: int) -> Float[Array, "B H W D"]:
        """The queries of the `count` columns before `stop`."""
        columns = jnp.maximum(self.stop[:, None] - count + jnp.arange(count)[None], 0)
        return jnp.take_along_axis(self.q, columns[:, None, :, None], axis=2)


class Scores(NamedTuple):
    """Importance of every row, float32: higher stays; +inf stays if the window leaves room.

    Padding and the window need no care: `prefill` masks the one and protects the other.
    """

    tokens: Float[Array, "B S"]  # decides what is propagated after this layer
    kv: Float[Array, "B N S"]  # decides what each cache head keeps of this layer


@runtime_checkable
class Method(Protocol):
    """What `prefill` asks of a method: frozen and hashable, since it is a static argument of jit."""

    @property
    def memory(self) -> int:
        """Layers whose token scores decide together, by their maximum, what is propagated; 1 = the last one alone."""
        ...

    def window(self, n: np.ndarray) -> np.ndarray:
        """Tokens at the end of the question that always stay, for each prompt length; all 0 for a method without."""
        ...

    def check(self, num_layers: int) -> None:
        """Raise `FastKVConfigError` if this model has no such layers."""
        ...

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """Budgets for every prompt length in `n`."""
        ...

    def scores(self, layer: Layer) -> Scores:
        """Importance of the rows of one layer."""
        ...
