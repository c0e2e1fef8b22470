"""`linear`, `projections` and `gated`: matrices of a stack whose others hold NaN, at sizes beside tiles."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from fastkv_jax.device_checks.kernels.inputs import Drawn, choice, ours, theirs
from fastkv_jax.device_checks.results import Check, Outcome, within
from fastkv_jax.device_checks.tolerances import OF_DTYPE, apart
from kernels_pallas import Norm
from kernels_pallas.arithmetic import rms_norm

EPS = 1e-5


class Case(NamedTuple):
    """x [B, I] times matrices [O, I], with all that may stand around them."""

    rows: int
    out: int
    inner: int
    dtype: str

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"B {self.rows}, O {self.out:,}, I {self.inner:,}, {self.dtype}, other layers NaN"


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """All of them, the most telling first."""
    for case in cases(platform, quick):
        for name, run in (("linear", _linear), ("projections", _projections), ("gated", _gated)):
            yield Check(f"{name} {case.name}", partial(run, case, platform))


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


def _stack(drawn: Drawn, case: Case, *sizes: int) -> np.ndarray:
    """Two layers of NaN, and one of random numbers."""
    found = drawn.normal(3, *sizes, dtype=case.dtype)
    found[:2] = float("nan")
    return found


def _linear(case: Case, platform: str) -> Outcome:
    drawn = Drawn(case.name)
    x, residual = (drawn.normal(case.rows, size, dtype=case.dtype) for size in (case.inner, case.out))
    weight, bias = _stack(drawn, case, case.out, case.inner), _stack(drawn, case, case.out)

    def mine(x, weight, bias, residual, layer):
        return kernels_pallas.linear(x, weight, layer, bias=bias, residual=residual, **choice(platform))

    found = ours(mine, platform, x, weight, bias, residual, jnp.int32(2))
    wanted = theirs(lambda x, w, b, r: x @ w.T + b[None] + r, x, weight[2], bias[2], residual)
    return within(apart(found, wanted), OF_DTYPE[case.dtype])


def _projections(case: Case, platform: str) -> Outcome:
    """Two matrices of different heights, compared as one."""
    drawn, few = Drawn(case.name), case.out // 4 + 1
    x, norm = drawn.normal(case.rows, case.inner, dtype=case.dtype), _stack(drawn, case, case.inner)
    weights = [_stack(drawn, case, size, case.inner) for size in (case.out, few)]

    def mine(x, norm, weights, layer):
        return jnp.concatenate(kernels_pallas.projections(x, Norm(norm, EPS), weights, layer, **choice(platform)), 1)

    found = ours(mine, platform, x, norm, weights, jnp.int32(2))
    wanted = theirs(lambda x, n, *w: rms_norm(x, n, EPS) @ jnp.concatenate(w).T, x, norm[2], *(w[2] for w in weights))
    return within(apart(found, wanted), OF_DTYPE[case.dtype])


def _gated(case: Case, platform: str) -> Outcome:
    drawn = Drawn(case.name)
    x, norm = drawn.normal(case.rows, case.inner, dtype=case.dtype), _stack(drawn, case, case.inner)
    norm /= np.asarray(case.inner**0.5, norm.dtype)  # so that gates are of size 1
    gate, up = (_stack(drawn, case, case.out, case.inner) for _ in range(2))

    def mine(x, norm, gate, up, layer):
        return kernels_pallas.gated(x, Norm(norm, EPS), gate, up, layer, **choice(platform))

    def exact(x, norm, gate, up):
        y = rms_norm(x, norm, EPS)
        return jax.nn.silu(y @ gate.T) * (y @ up.T)

    found = ours(mine, platform, x, norm, gate, up, jnp.int32(2))
    return within(apart(found, theirs(exact, x, norm[2], gate[2], up[2])), OF_DTYPE[case.dtype])
