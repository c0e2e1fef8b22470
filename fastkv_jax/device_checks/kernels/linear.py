"""`linear`: one matrix of a stack whose others hold NaN, at row counts and sizes beside tiles."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

import kernels_pallas
from fastkv_jax.device_checks.kernels.inputs import Drawn, choice, ours, theirs
from fastkv_jax.device_checks.results import Check, Outcome, within
from fastkv_jax.device_checks.tolerances import OF_DTYPE, apart


class Case(NamedTuple):
    """x [B, I] times a matrix [O, I]."""

    rows: int
    out: int
    inner: int
    dtype: str

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"linear B {self.rows}, O {self.out:,}, I {self.inner:,}, {self.dtype}, other layers NaN"


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """All of them, the most telling first."""
    return (Check(case.name, partial(_run, case, platform)) for case in cases(platform, quick))


def cases(platform: str, quick: bool) -> list[Case]:
    """Matrices of Llama-3.1-8B and SmolLM2, and sizes that no tile divides; on a CPU an eighth."""
    part = 8 if platform == "cpu" else 1
    half = "bfloat16"
    found = [Case(1, 4096 // part, 4096 // part, half), Case(17, 576, 1536 // part, half), Case(3, 33, 130, "float32")]
    if not quick:
        found += [
            Case(1, 1024 // part, 4096 // part, half),
            Case(8, 14_336 // part, 4096 // part, half),
            Case(8, 4096 // part, 14_336 // part, half),
            Case(64, 4096 // part, 4096 // part, half),
            Case(16, 127, 255, half),
            Case(15, 129, 257, "float32"),
            Case(1, 1536 // part, 576, "float32"),
        ]
        found += [Case(2, 576, 576, "float16")] * (platform != "tpu")
    return found


def _run(case: Case, platform: str) -> Outcome:
    drawn = Drawn(case.name)
    x = drawn.normal(case.rows, case.inner, dtype=case.dtype)
    weight = drawn.normal(3, case.out, case.inner, dtype=case.dtype)
    weight[:2] = float("nan")
    mine = ours(partial(kernels_pallas.linear, **choice(platform)), platform, x, weight, jnp.int32(2))
    return within(apart(mine, theirs(lambda x, w: x @ w.T, x, weight[2])), OF_DTYPE[case.dtype])
