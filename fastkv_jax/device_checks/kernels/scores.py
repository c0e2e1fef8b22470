"""`window_scores`: ragged rows, with numbers in the padding that must not count."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import kernels_pallas
from fastkv_jax.device_checks.kernels.inputs import Drawn, choice, ours, theirs
from fastkv_jax.device_checks.results import Check, Outcome, within
from fastkv_jax.device_checks.tolerances import SCORES, apart


class Case(NamedTuple):
    """Shapes, and what stands outside each row's prompt."""

    rows: int
    kv_heads: int
    group: int
    window: int
    tokens: int
    dim: int
    dtype: str
    pooling: str = "avg"
    kernel_size: int = 7
    poison: float = 1e3

    @property
    def name(self) -> str:
        """As the table has it."""
        return (f"window_scores B {self.rows}, K {self.kv_heads}, G {self.group}, W {self.window}, T {self.tokens:,}, "
                f"D {self.dim}, {self.dtype}, {self.pooling} {self.kernel_size}, padding {self.poison:g}")  # fmt: skip


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """All of them, the most telling first."""
    return (Check(case.name, partial(_run, case, platform)) for case in cases(platform, quick))


def cases(platform: str, quick: bool) -> list[Case]:
    """Head sizes, groups, windows, dtypes; lengths one below, at and one above a tile."""
    small = platform == "cpu"
    long = 300 if small else 32_768
    found = [
        Case(1 if small else 4, 2 if small else 8, 4, 8, long // 2, 128, "bfloat16", poison=float("nan")),
        Case(2, 2, 3, 16, long // 4, 64, "float32", "max", 21, 1e4),
    ]
    edges = [edge for tile in ((64,) if small else (128, 1024)) for edge in (tile - 1, tile, tile + 1)]
    found += [Case(2, 2, 4, 8, edge, 128, "bfloat16") for edge in (edges[:3:2] if quick else edges)]
    if not quick:
        found += [
            Case(2, 1, 8, 32, long // 8, 128, "bfloat16", "max", 49),
            Case(2, 2, 1, 3, 333, 80, "float32", "max", poison=float("nan")),
            Case(2, 2, 2, 8, 333, 16, "float32"),
            Case(1, 8, 4, 8, long, 128, "bfloat16"),
        ]
        found += [Case(2, 2, 4, 8, long // 8, 128, "float16", poison=1e4)] * (platform != "tpu")
    return found


def _run(case: Case, platform: str) -> Outcome:
    """A row has padding in front and tokens behind its window, one is whole, one has hardly more than its window."""
    drawn, n = Drawn(case.name), case.tokens
    q = drawn.normal(case.rows, case.kv_heads * case.group, case.window, case.dim, dtype=case.dtype)
    k = drawn.normal(case.rows, case.kv_heads, n, case.dim, dtype=case.dtype)
    start = np.array([n // 3, 0, max(n - case.window - 5, 0), 5], np.int32)[: case.rows]
    stop = np.array([n - 7, n, n, n - 1], np.int32)[: case.rows]
    for row in range(case.rows):
        k[row, :, : start[row]] = k[row, :, stop[row] :] = case.poison
    settings: Any = {"kernel_size": case.kernel_size, "pooling": case.pooling}
    run = partial(kernels_pallas.window_scores, **settings)
    mine = ours(partial(run, **choice(platform)), platform, q, k, start, stop)
    return within(apart(mine, theirs(run, q, k, start, stop)), SCORES)
