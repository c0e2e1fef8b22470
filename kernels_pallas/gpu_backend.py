"""The one place that knows which of Pallas's GPU backends compiles the kernels: Triton.

It works from jax 0.10 on; since 0.11 jax warns at lowering that it will go one day. Mosaic GPU, its successor, compiles
for Hopper and up only, and has another programming model.
"""

from types import ModuleType
from typing import Any

from jax.experimental import pallas as pl


def triton() -> ModuleType:
    """Pallas's module of Triton primitives (masked loads and stores)."""
    try:
        from jax.experimental.pallas import triton as module
    except ImportError as error:
        raise NotImplementedError(
            "this jax has no Triton backend for Pallas: use implementation='reference'"
        ) from error
    return module


def gpu_call(kernel, *, name: str, grid, out_shape, warps: int, stages: int, interpret: bool) -> Any:
    """`pl.pallas_call` of a kernel that gets whole arrays and loads what it needs; `stages` loads are in flight."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )
