"""Which platform runs, and whose kernels: said once, at the edge."""

from typing import Literal

import jax
from jax.core import Tracer

from fastkv_jax.model.llama import Llama

Platform = Literal["cpu", "gpu", "tpu"]
Kernels = Literal["reference", "tpu", "gpu"]
KERNELS: dict[Platform, Kernels] = {"cpu": "reference", "gpu": "gpu", "tpu": "tpu"}


def platform_of(model: Llama) -> Platform:
    """Where the model's weights live; where jax would put them if they are traced."""
    weights = model.norm[...]
    name = jax.default_backend() if isinstance(weights, Tracer) else next(iter(weights.devices())).platform
    return "gpu" if name in ("gpu", "cuda", "rocm") else "tpu" if name == "tpu" else "cpu"
