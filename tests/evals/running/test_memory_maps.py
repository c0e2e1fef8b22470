"""Compiled programs are dropped before they are too many for Linux."""

import jax
import pytest

from fastkv_jax.evals.running.memory_maps import forget_programs_if_many


@pytest.mark.parametrize(("most", "compiles"), [(0, 2), (10**9, 1)])
def test_programs_are_forgotten_only_if_there_are_many(most: int, compiles: int):
    traced = []

    @jax.jit
    def program(x):
        traced.append(x)
        return x + 1

    program(1)
    forget_programs_if_many(most)
    program(1)
    assert len(traced) == compiles
