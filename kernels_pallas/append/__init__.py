"""What a decode step does between its projections and its attention: rotate, and write to the cache."""

from jaxtyping import Array, Float, Int

from kernels_pallas.append import reference
from kernels_pallas.dispatch import Implementation, kernels


def append(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    turn: tuple[Float[Array, "B D"], Float[Array, "B D"]],
    buffers: tuple[Float[Array, "L B K M D"], Float[Array, "L B K M D"]],
    used: Int[Array, ""],
    layer: Int[Array, ""],
    *,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> tuple[Float[Array, "B H D"], Float[Array, "L B K M D"], Float[Array, "L B K M D"]]:
    """Queries rotated, and the two buffers with the rotated keys and the values in slot `used` of a layer.

    turn     cosine and sine of each row's angles, each half repeated, float32
    buffers  keys and values of all layers, updated in place where XLA can; behind their last slot nothing is written

    On a GPU one kernel does what XLA makes three of. Raises `ValueError` where the shapes or dtypes do not fit.
    """
    sizes = {a.shape[0] for a in (q, k, v, *turn)} | {a.shape[1] for a in buffers}
    heads = {a.shape[1] for a in (k, v)} | {a.shape[2] for a in buffers}
    dims = {a.shape[-1] for a in (q, k, v, *turn, *buffers)}
    if max(len(sizes), len(heads), len(dims), len({a.dtype for a in (q, k, v, *buffers)})) > 1 or q.shape[-1] % 2:
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (q, k, v, *turn, *buffers))
        raise ValueError(f"append: {given}")
    if implementation in ("reference", "tpu"):
        return reference.append(q, k, v, turn, buffers, used, layer)
    return kernels("append", implementation).append(q, k, v, turn, buffers, used, layer, interpret=interpret)
