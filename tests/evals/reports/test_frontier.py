"""The picture of accuracy against time: which runs are on it, and which of them no other beats."""

from fastkv_jax.evals.reports.averages import Average
from fastkv_jax.evals.reports.frontier import Point, best, draw, points
from fastkv_jax.evals.reports.tables import Row


def row(name: str, score: float, **costs: float) -> Row:
    return Row(name, {}, {"a": Average(score, 0, 100, 3), "b": Average(score + 10, 0, 100, 3)}, None, costs, 1, 3, 0)


ROWS = [row("full", 80, ttft_s=10.0), row("fast", 70, ttft_s=5.0), row("bad", 60, ttft_s=8.0)]


def test_times_are_those_of_the_first_run_and_scores_the_mean_of_averages():
    assert points(ROWS) == [Point("full", 1.0, 85.0), Point("fast", 2.0, 75.0), Point("bad", 1.25, 65.0)]


def test_runs_that_shared_a_prefill_or_failed_make_no_picture():
    assert points([*ROWS, row("shared", 70)]) == [] == points([])


def test_the_line_has_the_runs_that_no_other_beats_in_both():
    assert [p.name for p in best(points(ROWS))] == ["full", "fast"]
    assert [p.name for p in best([Point("one", 2, 50), Point("same", 2, 50), Point("worse", 2, 40)])] == ["one"]


def test_the_picture_is_drawn(tmp_path):
    draw(points(ROWS), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
