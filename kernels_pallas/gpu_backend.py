"""The one place that knows which of Pallas's GPU backends compiles the kernels: Triton.

It works from jax 0.10 on; since 0.11 jax warns at lowering that it will go one day. Mosaic GPU, its successor, compiles
for Hopper and up only, and has another programming model.
"""

import warnings
from types import ModuleType
from typing import Any

import jax
from jax.experimental import pallas as pl

# Triton's lowering counts elements in 32 bits with a sign, unless an array has more bytes than this: of one-byte
# entries those beyond half of it would be looked for in front of the array.
_NARROW_BYTES, _NARROW_ELEMENTS = 1 << 32, 1 << 31


def triton() -> ModuleType:
    """Pallas's module of Triton primitives (masked loads and stores)."""
    try:
        from jax.experimental.pallas import triton as module
    except ImportError as error:
        raise NotImplementedError(
            "this jax has no Triton backend for Pallas: use implementation='reference'"
        ) from error
    return module


def gpu_call(
    kernel,
    *,
    name: str,
    grid,
    out_shape,
    warps: int,
    stages: int,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> Any:
    """`pl.pallas_call` of a kernel that gets whole arrays and loads what it needs.

    `stages` loads are in flight; `aliases`: which input each output that is one of them updates in place.
    """
    # jax 0.11 and later say whenever such a kernel is lowered, which is after this, that Triton will go: where every
    # warning is an error nothing would compile.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
        input_output_aliases=aliases or {},
        interpret=interpret,
        name=name,
    )


def fits_offsets(elements: int, itemsize: int) -> bool:
    """Whether a kernel finds every element of an array of this size."""
    return elements <= _NARROW_ELEMENTS or elements * itemsize > _NARROW_BYTES


def check_offsets(name: str, array: jax.Array) -> None:
    """Raise `ValueError` for an array whose elements a kernel would not find."""
    if not fits_offsets(array.size, array.dtype.itemsize):
        raise ValueError(
            f"{name}: {array.dtype}{list(array.shape)} has {array.size:,} elements; "
            f"of one byte each there may be up to {_NARROW_ELEMENTS:,}, or more than {_NARROW_BYTES:,}"
        )
