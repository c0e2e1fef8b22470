"""Which platform runs, and whose kernels: said once, at the edge. And what a GPU must be told of float32."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal

Platform = Literal["cpu", "gpu", "tpu"]
Kernels = Literal["reference", "tpu", "gpu"]
KERNELS: dict[Platform, Kernels] = {"cpu": "reference", "gpu": "gpu", "tpu": "tpu"}  # unless a caller says otherwise


def full_precision(platform: Platform, dtype: Any) -> contextlib.AbstractContextManager[object]:
    """Where products are traced: those of float32 numbers are made in float32. A GPU would take 10 of their 23 bits."""
    import jax

    if platform == "gpu" and dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def in_full_precision(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program of a model and `static`, which names the platform, traced in `full_precision`."""

    @functools.wraps(program)
    def traced(model: Any, *args: Any, static: Any, **options: Any) -> Any:
        with full_precision(static.platform, model.dtype):
            return program(model, *args, static=static, **options)

    return traced


def cudnn_attends(dtype: Any, head_dim: int) -> bool:
    """Whether any NVIDIA GPU's cuDNN has attention for it; jax refuses the rest. Hopper has it up to 256."""
    return dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128
