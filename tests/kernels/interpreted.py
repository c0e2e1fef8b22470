"""How the tests compile interpreted kernels: quickly. They are long programs that run for milliseconds."""

from collections.abc import Callable

import jax

QUICKLY = {"xla_backend_optimization_level": 0}


def jit(run: Callable, **choice) -> Callable:
    return jax.jit(run, compiler_options=QUICKLY, **choice)
