"""Means of samples' scores, times 100, with the interval that other samples might have given.

A row is any mapping with task, score (0 to 1) and group. Overall means weigh tasks, or groups of tasks, equally, not
samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastkv_jax.errors import InputError

RESAMPLES = 2_000
Rows = Iterable[Mapping[str, Any]]


class Average(NamedTuple):
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


def of_means(means: Mapping[str, float], groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, float]:
    """From tasks' means, in their unit: "tasks", the mean of them; of each group that is whole its mean; and of all
    groups, if they are whole, "groups". Empty without tasks.
    """
    if not means:
        return {}
    found = {
        name: sum(means[task] for task in tasks) / len(tasks)
        for name, tasks in (groups or {}).items()
        if all(task in means for task in tasks)
    }
    if groups and len(found) == len(groups):
        found["groups"] = sum(found.values()) / len(groups)
    return {**found, "tasks": sum(means.values()) / len(means)}


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The ends of the 95 % interval of the scores' mean, in their unit."""
    found = _mean([[np.asarray(scores, float)]], seed)
    return found.low / 100, found.high / 100


def split(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each `group`: a length, a bucket of LongBench-E, a cell of the needle grid."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(str(row["group"]), []).append(row)
    return parts


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
