"""A few rows times one matrix of a stack: what a decode step does with the weights of each layer."""

from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, kernels
from kernels_pallas.linear import reference

MOST_ROWS = 64  # with more, a product is worth a library's kernel and the copy before it


def linear(
    x: Float[Array, "B I"],
    weight: Float[Array, "L O I"],
    layer: Int[Array, ""],
    *,
    implementation: Implementation = "reference",
    interpret: bool = False,
) -> Float[Array, "B O"]:
    """x @ weight[layer].T, summed in float32, in x's dtype.

    On a GPU XLA would copy the layer's matrix out of the stack first; the kernel reads it where it is, once for every
    16 rows. There is no kernel for a TPU, where XLA does as well. Raises `ValueError` where the shapes or dtypes do not
    fit.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or x.dtype != weight.dtype:
        raise ValueError(f"linear: {x.dtype}{list(x.shape)} times {weight.dtype}{list(weight.shape)}")
    if implementation in ("reference", "tpu") or x.shape[0] > MOST_ROWS:
        return reference.linear(x, weight, layer)
    return kernels("linear", implementation).linear(x, weight, layer, interpret=interpret)
