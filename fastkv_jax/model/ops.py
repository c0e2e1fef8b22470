"""The operations of `kernels_pallas` as one platform runs them, each device of a mesh its own heads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from fastkv_jax.model.platforms import Kernels
from fastkv_jax.model.sharding import DATA, MODEL, spec

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

    def select(self, scores: Float[Array, "B N T"], count: Int[Array, "B N"], capacity: int) -> Int[Array, "B N C"]:
        """See `kernels_pallas.select`."""
        run = lambda s, c: kernels_pallas.select(s, c, capacity, implementation=self.kernels)  # noqa: E731
        return self._by_head(run, (scores, count), (HEADS, HEADS), scores.shape[1])

    def among_best(self, scores: Float[Array, "B N T"], count: Int[Array, "B N"]) -> Bool[Array, "B N T"]:
        """See `kernels_pallas.among_best`."""
        run = lambda s, c: kernels_pallas.among_best(s, c, implementation=self.kernels)  # noqa: E731
        return self._by_head(run, (scores, count), (HEADS, HEADS), scores.shape[1])

    def decode_attention(
        self, q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads, k_scale, v_scale, layer
    ) -> Float[Array, "B H D"]:
        """See `kernels_pallas.decode_attention`; entries of all layers, and `layer` says which is meant."""

        def run(q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads, k_scale, v_scale, *layer):
            return kernels_pallas.decode_attention(
                q, k_prompt, v_prompt, positions, k_new, v_new, filled,
                heads=heads, k_scale=k_scale, v_scale=v_scale, layer=layer, implementation=self.kernels,
            )  # fmt: skip

        given = (q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads, k_scale, v_scale, *layer)
        specs = (HEADS,) + (LAYERS,) * 5 + (ROWS,) + (LAYERS,) * 3 + ((),) * 2
        return self._by_head(run, given, specs, k_prompt.shape[2])

    def _by_head(self, run: Callable[..., Any], given: tuple[Any, ...], axes: tuple[Any, ...], heads: int) -> Any:
        """`run` on each device's rows and heads. Plain jax.numpy needs no help from us: XLA spreads it as it likes."""
        mesh = self.mesh
        if mesh is None or self.kernels == "reference":
            return run(*given)
        if heads % mesh.shape.get(MODEL, 1):  # one row of scores, or one flat cache, for all heads: on every device
            axes = tuple(mine[:-1] if MODEL in mine else mine for mine in axes)
        specs = tuple(None if a is None else spec(mesh, a.shape, *mine) for a, mine in zip(given, axes, strict=True))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*given)


PLAIN = Ops()
