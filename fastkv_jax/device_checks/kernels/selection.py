"""Step `selection`: `select` and `among_best` against a stable sort in NumPy, equal to the last index."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import kernels_pallas
from fastkv_jax.device_checks.kernels.inputs import Drawn, choice, ours
from fastkv_jax.device_checks.results import Check, Outcome, equal


class Case(NamedTuple):
    """Rows of scores, the slots for the best of them, and what scores."""

    rows: int
    tokens: int
    capacity: int
    kind: str

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"S {self.rows}, T {self.tokens:,}, C {self.capacity:,}, {self.kind}"


CASES = [
    Case(8, 131_072, 13_184, "ties"),
    Case(8, 32_768, 4096, "uniform"),
    Case(3, 1025, 1023, "ties"),
    Case(2, 300, 40, "ties"),
    Case(2, 1024, 1024, "one value"),
    Case(1, 1_048_576, 104_960, "uniform"),
]
SMALL = [Case(3, 1025, 1023, "ties"), Case(2, 300, 40, "one value")]


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """Scores at random, of few values, of one, each with both infinities."""
    cases = SMALL if platform == "cpu" else CASES[:3] if quick else CASES
    for case in cases:
        yield Check(f"select {case.name}", partial(_select, case, platform))
    for case in cases[:1]:
        yield Check(f"among_best {case.name}", partial(_among_best, case, platform))


def _inputs(case: Case) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Scores [S, T], counts [S], and of each row the best, ascending."""
    scores = Drawn(case.name).random.random((case.rows, case.tokens), np.float32)
    scores = {"uniform": scores, "ties": np.floor(scores * 50), "one value": np.ones_like(scores)}[case.kind]
    scores[:, :9], scores[:, -5:] = -np.inf, np.inf
    count = np.linspace(case.capacity // 2, case.capacity, case.rows).astype(np.int32)
    return (
        scores,
        count,
        [np.sort(np.argsort(-row, kind="stable")[:few]) for row, few in zip(scores, count, strict=True)],
    )


def _select(case: Case, platform: str) -> Outcome:
    scores, count, best = _inputs(case)
    found = ours(partial(kernels_pallas.select, capacity=case.capacity, **choice(platform)), platform, scores, count)
    return _equal(found, [np.concatenate([np.full(case.capacity - len(row), -1), row]) for row in best])


def _among_best(case: Case, platform: str) -> Outcome:
    scores, count, best = _inputs(case)
    found = ours(partial(kernels_pallas.among_best, **choice(platform)), platform, scores, count)
    return _equal([np.flatnonzero(row) for row in found], best)


def _equal(found: Any, wanted: list[np.ndarray]) -> Outcome:
    return equal(sum(not np.array_equal(*pair) for pair in zip(found, wanted, strict=True)), len(wanted), "rows")
