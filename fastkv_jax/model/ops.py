"""The operations of `kernels_pallas` as one platform runs them, each device of a mesh its own heads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from fastkv_jax.model.platforms import Kernels
from fastkv_jax.model.sharding import DATA, MODEL, spec
from kernels_pallas import Slots

HEADS, ROWS, LAYERS = (DATA, MODEL), (DATA,), (None, DATA, MODEL)  # what the first axes of an array are split over


@dataclass(frozen=True)
class Ops:
    """Which kernels run, and on which mesh; a static part of a compiled program."""

    kernels: Kernels = "reference"
    mesh: Mesh | None = None

    def window_scores(
        self,
        q: Float[Array, "B H W D"],
        k: Float[Array, "B K T D"],
        start: Int[Array, " B"],
        stop: Int[Array, " B"],
        *,
        kernel_size: int,
        pooling: Literal["max", "avg"],
    ) -> Float[Array, "B K T"]:
        """See `kernels_pallas.window_scores`."""

        def run(q, k, start, stop):
            options: dict[str, Any] = {"kernel_size": kernel_size, "pooling": pooling}
            return kernels_pallas.window_scores(q, k, start, stop, implementation=self.kernels, **options)

        return self._by_head(run, (q, k, start, stop), (HEADS, HEADS, ROWS, ROWS), k.shape[1])

    def select(self, scores: Float[Array, "*S T"], count: Int[Array, "*S"], capacity: int) -> Int[Array, "*S C"]:
        """See `kernels_pallas.select`."""
        run = lambda s, c: kernels_pallas.select(s, c, capacity, implementation=self.kernels)  # noqa: E731
        return self._by_head(run, (scores, count), (HEADS, HEADS), scores.shape[1])

    def among_best(self, scores: Float[Array, "*S T"], count: Int[Array, "*S"]) -> Bool[Array, "*S T"]:
        """See `kernels_pallas.among_best`."""
        run = lambda s, c: kernels_pallas.among_best(s, c, implementation=self.kernels)  # noqa: E731
        return self._by_head(run, (scores, count), (HEADS, HEADS), scores.shape[1])

    def append(
        self,
        q: Float[Array, "B H D"],
        k: Float[Array, "B K D"],
        v: Float[Array, "B K D"],
        turn: tuple[Float[Array, "B D"], Float[Array, "B D"]],
        buffers: tuple[Float[Array, "L B K M D"], Float[Array, "L B K M D"]],
        used: Int[Array, ""],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B H D"], Float[Array, "L B K M D"], Float[Array, "L B K M D"]]:
        """See `kernels_pallas.append`."""
        run = partial(kernels_pallas.append, implementation=self.kernels)
        axes = HEADS, HEADS, HEADS, (ROWS, ROWS), (LAYERS, LAYERS), (), ()
        made = HEADS, LAYERS, LAYERS
        return self._by_head(run, (q, k, v, turn, buffers, used, layer), axes, k.shape[1], ((q, *buffers), made))

    def decode_attention(
        self,
        q: Float[Array, "B H D"],
        prompt: Slots,
        new: Slots,
        filled: Int[Array, " B"],
        layer: tuple[Int[Array, ""], Int[Array, ""]],
    ) -> Float[Array, "B H D"]:
        """See `kernels_pallas.decode_attention`; entries of all layers, and `layer` says which is meant."""
        run = partial(kernels_pallas.decode_attention, implementation=self.kernels)
        of_layers = Slots(*[LAYERS] * len(Slots._fields))
        axes = (HEADS, of_layers, of_layers, ROWS, ((), ()))
        return self._by_head(run, (q, prompt, new, filled, layer), axes, prompt.k.shape[2])

    def _by_head(
        self, run: Callable[..., Any], given: tuple[Any, ...], axes: tuple[Any, ...], heads: int, made: Any = None
    ) -> Any:
        """`run` on each device's rows and heads. Plain jax.numpy needs no help from us: XLA spreads it as it likes.

        made: arrays of the results' shapes, and their axes (default: one like the first of those given)
        """
        mesh = self.mesh
        if mesh is None or self.kernels == "reference":
            return run(*given)
        every = heads % mesh.shape.get(MODEL, 1) > 0  # one row of scores, or one flat cache, for all heads: everywhere

        def place(a: Array | None, mine: tuple[str | None, ...]) -> Any:
            return None if a is None else spec(mesh, a.shape, *(mine[:-1] if every and MODEL in mine else mine))

        there, back = (jax.tree.map(place, *pair, is_leaf=lambda a: a is None) for pair in
                       ((given, axes), made or (given[0], axes[0])))  # fmt: skip
        return jax.shard_map(run, mesh=mesh, in_specs=there, out_specs=back, check_vma=False)(*given)


PLAIN = Ops()
