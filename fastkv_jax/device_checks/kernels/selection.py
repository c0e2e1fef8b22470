"""Step `selection`: `select` and `among_best` against a stable sort in NumPy, equal to the last index."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

import kernels_pallas
from fastkv_jax.device_checks.kernels.inputs import QUICKLY, Drawn
from fastkv_jax.device_checks.results import Check, Outcome, equal

CASES = [(8, 131_072, 13_184, "ties"), (8, 32_768, 4096, "uniform"), (3, 1025, 1023, "ties"), (2, 300, 40, "ties"),
         (2, 1024, 1024, "one value"), (1, 1_048_576, 104_960, "uniform")]  # fmt: skip
SMALL = [(3, 1025, 1023, "ties"), (2, 300, 40, "uniform"), (2, 300, 40, "one value")]


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """Rows of random scores, of few values, of one value; each with both infinities. On a CPU TPU kernels interpreted."""
    which = {"implementation": "tpu", "interpret": True} if platform == "cpu" else {"implementation": platform}
    cases = SMALL if platform == "cpu" else CASES[:3] if quick else CASES
    for rows, tokens, capacity, kind in cases:
        name = f"S {rows}, T {tokens:,}, C {capacity:,}, {kind}"
        yield Check(f"select {name}", partial(_select, rows, tokens, capacity, kind, which))
    for rows, tokens, capacity, kind in cases[:2]:
        name = f"S {rows}, T {tokens:,}, {kind}"
        yield Check(f"among_best {name}", partial(_among_best, rows, tokens, capacity, kind, which))


def _inputs(rows: int, tokens: int, capacity: int, kind: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Scores [S, T], counts [S], and of each row the best, ascending."""
    random = Drawn(f"{rows} {tokens} {kind}").random
    scores = random.random((rows, tokens), np.float32)
    scores = {"uniform": scores, "ties": np.floor(scores * 50), "one value": np.ones_like(scores)}[kind]
    scores[:, :9], scores[:, -5:] = -np.inf, np.inf
    count = np.linspace(capacity // 2, capacity, rows).astype(np.int32)
    best = [np.sort(np.argsort(-row, kind="stable")[:few]) for row, few in zip(scores, count, strict=True)]
    return scores, count, best


def _jit(run: Any, which: dict[str, Any]) -> Any:
    return jax.jit(
        partial(run, **which), static_argnames=("capacity",), compiler_options=QUICKLY if "interpret" in which else None
    )


def _select(rows: int, tokens: int, capacity: int, kind: str, which: dict[str, Any]) -> Outcome:
    scores, count, best = _inputs(rows, tokens, capacity, kind)
    found = np.asarray(_jit(kernels_pallas.select, which)(scores, count, capacity=capacity))
    wanted = [np.concatenate([np.full(capacity - len(row), -1), row]) for row in best]
    return equal(sum(not np.array_equal(*pair) for pair in zip(found, wanted, strict=True)), rows, "rows")


def _among_best(rows: int, tokens: int, capacity: int, kind: str, which: dict[str, Any]) -> Outcome:
    scores, count, best = _inputs(rows, tokens, capacity, kind)
    run = jax.jit(
        partial(kernels_pallas.among_best, **which), compiler_options=QUICKLY if "interpret" in which else None
    )
    found = np.asarray(run(scores, count))
    return equal(sum(not np.array_equal(np.flatnonzero(a), b) for a, b in zip(found, best, strict=True)), rows, "rows")
