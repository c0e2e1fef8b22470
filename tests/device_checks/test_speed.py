"""Times that other programs disturb are taken again, and never given for what they are not."""

import pytest

from fastkv_jax.benchmarks.device_rates import Case
from fastkv_jax.device_checks import speed
from fastkv_jax.device_checks.results import Missing


def timed(monkeypatch, seconds: list[float], repeats: int) -> list[float]:
    left = iter(seconds)
    case = Case("copy", "", lambda: None, (), 1, 1)
    monkeypatch.setattr(speed, "timer", lambda case: lambda: case.seconds.append(next(left)))
    speed.time_case(case, repeats)
    return case.seconds


def test_as_many_as_asked_for_if_their_median_can_be(monkeypatch):
    assert timed(monkeypatch, [1.0, -2.0, 3.0, 4.0], 3) == [1.0, -2.0, 3.0]


def test_a_negative_median_is_no_time(monkeypatch):
    assert timed(monkeypatch, [-1.0, -2.0, 3.0, 4.0, 5.0], 1) == [-1.0, -2.0, 3.0, 4.0]
    with pytest.raises(Missing, match="too busy"):
        timed(monkeypatch, [-1.0] * 9, 1)
