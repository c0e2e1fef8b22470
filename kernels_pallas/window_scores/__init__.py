"""Score accumulation: how much the observation window attends to every key (FastKV, arXiv 2502.01068v7, eq. 1)."""

from typing import Literal

from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, kernels
from kernels_pallas.window_scores import reference
from kernels_pallas.window_scores.reference import pool

__all__ = ["pool", "window_scores"]


def window_scores(
    q: Float[Array, "B H W D"],
    k: Float[Array, "B K T D"],
    start: Int[Array, " B"],
    stop: Int[Array, " B"],
    *,
    kernel_size: int,
    pooling: Literal["max", "avg"],
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Float[Array, "B K T"]:
    """Attention of the W queries at columns [stop - W, stop) to every key, pooled along T, summed over each group.

    Columns outside [start, stop - W) hold 0 before pooling: the window and the padding are no candidates.
    float32, all values >= 0. `interpret` runs the kernels of a platform on the CPU.
    Raises `ValueError` where the shapes or the settings cannot be.
    """
    if q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"window_scores: q {q.shape} and k {k.shape} do not form GQA groups")
    if kernel_size < 1 or kernel_size % 2 == 0 or pooling not in ("max", "avg"):
        raise ValueError(f"window_scores: kernel_size {kernel_size} must be odd, pooling {pooling!r} 'max' or 'avg'")
    if implementation == "reference":
        return reference.window_scores(q, k, start, stop, kernel_size=kernel_size, pooling=pooling)
    run = kernels("window_scores", implementation).window_scores
    return run(q, k, start, stop, kernel_size=kernel_size, pooling=pooling, interpret=interpret)
