"""Means are the papers', and intervals hold them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv_jax.errors import InputError
from fastkv_jax.evals.reports import averages
from fastkv_jax.evals.suites.longbench import GROUPS, TASKS

# Llama-3.1-8B-Instruct, full context: FastKV's paper, v7, table 6 and table 2
PRINTED = [30.21, 45.53, 55.01, 56.01, 46.65, 31.28, 35.13, 25.28, 27.25, 73.0, 91.64, 43.8, 8.91, 99.5, 63.38, 56.64]


def rows(scores: dict[str, list[float]], group: str = ""):
    return [{"task": task, "score": score, "group": group} for task, some in scores.items() for score in some]


PUBLISHED = rows({task: [score / 100] for task, score in zip(TASKS, PRINTED, strict=True)})


def test_the_paper_s_average_is_the_mean_of_six_group_means():
    assert averages.of_groups(PUBLISHED, GROUPS).mean == pytest.approx(50.19, abs=0.005)
    assert averages.of_tasks(PUBLISHED).mean == pytest.approx(49.33, abs=0.005)
    means = {task: average.mean for task, average in averages.by_task(PUBLISHED).items()}
    assert means == pytest.approx(dict(zip(TASKS, PRINTED, strict=True)))
    groups = averages.by_group(PUBLISHED, GROUPS)
    assert list(groups) == list(GROUPS)
    assert groups["code"].mean == pytest.approx((63.38 + 56.64) / 2) and groups["code"].samples == 2


def test_tasks_weigh_the_same_however_many_samples_they_have():
    few = rows({"a": [1.0], "b": [0.0, 0.0, 0.0, 1.0]})
    assert averages.of_tasks(few).mean == pytest.approx(62.5)
    assert averages.of_tasks(few).samples == 5


def test_a_mean_of_groups_needs_every_task():
    part = [row for row in PUBLISHED if row["task"] not in ("lcc", "trec")]
    for mean in (averages.of_groups, averages.by_group):
        with pytest.raises(InputError, match="the mean of the groups needs every task; without samples: trec, lcc"):
            mean(part, GROUPS)


def test_no_scores_have_no_mean():
    for mean in (averages.by_task, averages.of_tasks):
        with pytest.raises(InputError, match="an average needs one score at least"):
            mean([])


def test_lengths_are_what_groups_begin_with():
    some = [*rows({"a": [1.0], "b": [0.0]}, "4096"), *rows({"a": [0.0]}, "8192/50"), *rows({"a": [1.0]}, "8192/100")]
    found = averages.by_length(some, "RULER")
    assert {name: (mean.mean, mean.samples) for name, mean in found.items()} == {
        "RULER 4096": (50, 2),
        "RULER 8192": (50, 2),
    }


def test_a_likelihood_is_in_nats_and_not_times_100():
    found = averages.likelihood([{"nll": 2.0}, {"nll": 3.0}])
    assert (found.mean, found.low, found.high, found.samples) == pytest.approx((2.5, 2.0, 3.0, 2))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_the_interval_lies_within_the_scores_and_is_the_same_every_time(scores: list[float], seed: int):
    found = averages.by_task(rows({"a": scores}), seed)["a"]
    assert 100 * min(scores) - 1e-7 <= found.low <= found.high <= 100 * max(scores) + 1e-7
    assert found == averages.by_task(rows({"a": scores}), seed)["a"]


def test_the_interval_is_as_wide_as_chance():
    n, p = 400, 0.25
    found = averages.by_task(rows({"a": [1.0] * 100 + [0.0] * 300}))["a"]
    half = 100 * 1.96 * math.sqrt(p * (1 - p) / n)
    assert found.low == pytest.approx(100 * p - half, abs=0.6) and found.high == pytest.approx(100 * p + half, abs=0.6)
    # of two such tasks: narrower by the square root of two
    both = averages.of_tasks(rows({"a": [1.0] * 100 + [0.0] * 300, "b": [1.0] * 100 + [0.0] * 300}))
    assert (both.high - both.low) / 2 == pytest.approx(half / math.sqrt(2), abs=0.6)
