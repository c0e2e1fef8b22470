"""What the checks of kernels share: numbers drawn on the host, and how either side is run."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastkv_jax.benchmarks.kernel_cases import has_float8
from fastkv_jax.device_checks.results import Missing

QUICKLY = {"xla_backend_optimization_level": 0}  # interpreted kernels are long programs that run for milliseconds


class Drawn:
    """Random numbers of one check, from its name: the same in every run, whatever ran before it."""

    def __init__(self, name: str):
        self.random = np.random.default_rng(zlib.crc32(name.encode()))

    def normal(self, *shape: int, dtype: str) -> np.ndarray:
        """Of the standard normal distribution, rounded to `dtype`."""
        return self.random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


def choice(platform: str) -> dict[str, Any]:
    """Which kernels: the platform's own; on a CPU those for a GPU, interpreted."""
    return {"implementation": "gpu", "interpret": True} if platform == "cpu" else {"implementation": platform}


def jit(run: Callable[..., Any], platform: str, **more: Any) -> Callable[..., Any]:
    """A program with a kernel in it."""
    return jax.jit(run, compiler_options=QUICKLY if platform == "cpu" else None, **more)


def ours(run: Callable[..., Any], platform: str, *arrays: Any) -> np.ndarray:
    """`run` of the arrays as one program."""
    return np.asarray(jit(run, platform)(*arrays))


def theirs(run: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """The reference: the same rounded inputs, in float32, with no product rounded."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(run)(*jax.tree.map(_exact, arrays)))


def _exact(a: Any) -> Any:
    """Numbers of 16 bits as float32; entries of 8 bits and positions as they are."""
    return jnp.asarray(a, jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize == 2 else a


def check_float8(platform: str) -> None:
    """Raise `Missing` where the device has no float8_e4m3fn."""
    if not has_float8(platform):
        capability = jax.local_devices()[0].compute_capability
        raise Missing(f"float8_e4m3fn needs compute capability 8.9, this device has {capability}")
