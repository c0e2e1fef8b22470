"""Exact top-k without a sort: the only place that chooses positions."""

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.dispatch import Implementation, kernels
from kernels_pallas.select import reference


def select(
    scores: Float[Array, "*S T"],
    count: Int[Array, "*S"],
    capacity: int,
    *,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Int[Array, "*S C"]:
    """Indices of the `count` largest scores of each row, ascending, right-aligned in `capacity` slots, -1 in the rest.

        scores  5. 1. 9. 9. 2.   count 3, capacity 4   ->   -1  0  2  3

    Ties go to the lowest index. +inf marks an entry that must stay, -inf one that must not.
    Needs 0 <= count <= capacity (unchecked: traced). `interpret` runs the kernels of a platform on the CPU.
    On a GPU XLA's own kernels run, fewer of them: see `kernels_pallas.select.gpu`.
    Raises `ValueError` if capacity exceeds T.
    """
    if not 0 < capacity <= scores.shape[-1]:
        raise ValueError(f"select: capacity {capacity} is outside 1..{scores.shape[-1]}")
    if implementation == "reference":
        return reference.select(scores, count, capacity)
    return kernels("select", implementation).select(scores, count, capacity, interpret=interpret)


def among_best(
    scores: Float[Array, "*S T"],
    count: Int[Array, "*S"],
    *,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Bool[Array, "*S T"]:
    """Whether each score is one of the `count` largest of its row; ties go to the lowest index."""
    if implementation == "reference":
        return reference.among_best(scores, count)
    return kernels("select", implementation).among_best(scores, count, interpret=interpret)
