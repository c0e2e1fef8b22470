"""Means of samples' scores, times 100, with the interval that other samples might have given.

A row is any mapping with task, score (0 to 1) and group. Overall means weigh tasks, or groups of tasks, equally, not
samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastkv_jax.errors import InputError

RESAMPLES = 2_000
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Average:
    """A mean times 100, its bootstrap 95 % interval over samples, and the samples it is made of."""

    mean: float
    low: float
    high: float
    samples: int


def by_task(rows: Rows, seed: int = 0) -> dict[str, Average]:
    """Each task's mean."""
    return {task: _mean([[scores]], seed) for task, scores in _scores(rows).items()}


def of_tasks(rows: Rows, seed: int = 0) -> Average:
    """The mean of the tasks' means: RULER's average, and LongBench's plain one. Raises `InputError` without rows."""
    return _mean([[scores] for scores in _scores(rows).values()], seed)


def by_group(rows: Rows, groups: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, Average]:
    """The mean of the tasks' means for each group of tasks. Raises `InputError` if a task has no samples."""
    scores = _complete(rows, groups)
    return {name: _mean([[scores[task]] for task in tasks], seed) for name, tasks in groups.items()}


def of_groups(rows: Rows, groups: Mapping[str, Sequence[str]], seed: int = 0) -> Average:
    """The mean of the groups' means, as FastKV's paper averages LongBench. Raises `InputError` if a task is missing."""
    scores = _complete(rows, groups)
    return _mean([[scores[task] for task in tasks] for tasks in groups.values()], seed)


def by_length(rows: Rows, name: str) -> dict[str, Average]:
    """The mean of the tasks' means for each length, which is what a row's `group` begins with; `name` heads them."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(str(row["group"]).partition("/")[0], []).append(row)
    return {f"{name} {length}": of_tasks(part) for length, part in parts.items()}


def likelihood(rows: Rows, seed: int = 0) -> Average:
    """Of the rows' `nll`, in nats per token, not times 100."""
    found = _mean([[np.array([float(row["nll"]) for row in rows])]], seed)
    return Average(found.mean / 100, found.low / 100, found.high / 100, found.samples)


def _scores(rows: Rows) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(str(row["task"]), []).append(float(row["score"]))
    if not found:
        raise InputError("an average needs one score at least; there is none")
    return {task: np.array(scores) for task, scores in found.items()}


def _complete(rows: Rows, groups: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    scores = _scores(rows)
    if missing := [task for tasks in groups.values() for task in tasks if task not in scores]:
        raise InputError(f"the mean of the groups needs every task; without samples: {', '.join(missing)}")
    return scores


def _mean(groups: Sequence[Sequence[np.ndarray]], seed: int) -> Average:
    """The mean over groups of the mean over tasks. Samples are drawn anew within each task."""
    random = np.random.default_rng(seed)

    def over(values: Sequence[Sequence[Any]]) -> Any:
        return 100 * sum(sum(tasks) / len(tasks) for tasks in values) / len(values)

    drawn = over([[_drawn_means(scores, random) for scores in tasks] for tasks in groups])
    low, high = np.quantile(drawn, [0.025, 0.975])
    exact = over([[float(scores.mean()) for scores in tasks] for tasks in groups])
    return Average(exact, float(low), float(high), sum(len(scores) for tasks in groups for scores in tasks))


def _drawn_means(scores: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return scores[random.integers(len(scores), size=(RESAMPLES, len(scores)))].mean(axis=1)
