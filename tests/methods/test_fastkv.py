"""FastKV's budgets against the rules in plain Python, and the settings it refuses."""

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkv_jax as fk

LAYERS = 4
lengths = st.integers(1, 4097)
rates = st.floats(0.001, 1.0) | st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
windows = st.integers(1, 64)
counts = st.integers(64, 5000)  # never below the window


def budgets(method: fk.FastKV, n: int) -> tuple[int, int, int]:
    """(kept up to the TSP layer, rows propagated, kept after it)"""
    with_tsp, after = method.plan(np.array([n]), LAYERS)
    assert (with_tsp.first, with_tsp.stop, after.first, after.stop) == (0, 2, 2, LAYERS)
    assert with_tsp.tokens.tolist() == [n]
    return int(with_tsp.kept[0]), int(after.tokens[0]), int(after.kept[0])


def make(**chosen: Any) -> fk.FastKV:
    with warnings.catch_warnings(action="ignore"):  # retention_rate > tsp_rate has a test of its own
        return fk.FastKV(tsp_layer=1, **chosen)


@given(n=lengths, tsp=rates, retention=rates, window=windows)
@settings(max_examples=300, deadline=None)
def test_two_rates_truncate_twice(n: int, tsp: float, retention: float, window: int):
    rows = min(n, max(window, int(n * tsp)))
    before = min(n, max(window, int(n * retention)))
    # int(n * tsp) is below the window only where the window decides the result either way
    after = min(rows, max(window, int(int(n * tsp) * (retention / tsp))))
    method = make(tsp_rate=tsp, retention_rate=retention, window_size=window)
    assert budgets(method, n) == (before, rows, after)


@given(n=lengths, tsp=counts, retention=rates, window=windows)
@settings(deadline=None)
def test_tsp_length_with_retention_rate_keeps_that_share_of_the_prompt_in_all_layers(n, tsp, retention, window):
    rows = min(n, max(window, tsp))
    kept = max(window, int(n * retention))
    method = make(tsp_length=tsp, retention_rate=retention, window_size=window)
    assert budgets(method, n) == (min(n, kept), rows, min(rows, kept))


@given(n=lengths, tsp=rates, capacity=counts, window=windows)
@settings(deadline=None)
def test_capacity_with_tsp_rate_keeps_that_many_where_they_are(n, tsp, capacity, window):
    rows = min(n, max(window, int(n * tsp)))
    method = make(tsp_rate=tsp, capacity=capacity, window_size=window)
    assert budgets(method, n) == (min(n, capacity), rows, min(rows, capacity))


@given(n=lengths, tsp=counts, capacity=counts, window=windows)
@settings(deadline=None)
def test_two_counts_are_capped_by_the_rows_there_are(n, tsp, capacity, window):
    tsp, capacity = max(tsp, capacity), min(tsp, capacity)
    method = make(tsp_length=tsp, capacity=capacity, window_size=window)
    assert budgets(method, n) == (min(n, capacity), min(n, tsp), min(n, capacity))


@given(n=lengths, least=st.integers(0, 5000))
@settings(deadline=None)
def test_a_prompt_below_min_prompt_to_compress_is_left_whole(n: int, least: int):
    method = make(tsp_rate=0.2, retention_rate=0.1, min_prompt_to_compress=least)
    compressed = budgets(make(tsp_rate=0.2, retention_rate=0.1), n)
    assert budgets(method, n) == ((n, n, n) if n < least else compressed)


@given(n=lengths, tsp=counts, capacity=counts)
@settings(deadline=None)
def test_in_the_published_code_a_prompt_below_its_capacity_skips_propagation_too(n: int, tsp: int, capacity: int):
    method = fk.FastKV.reference(tsp_layer=1, tsp_length=tsp, capacity=capacity)
    rows = n if n < capacity else min(n, tsp)
    assert budgets(method, n) == (min(n, capacity), rows, min(rows, capacity))


def test_budgets_known_by_hand():
    assert budgets(make(tsp_rate=0.4, retention_rate=0.3), 101) == (30, 40, 29)  # 40 * (0.3 / 0.4) is just below 30
    assert budgets(make(tsp_rate=0.2, retention_rate=0.1), 128_000) == (12_800, 25_600, 12_800)
    assert budgets(make(), 1000) == (100, 200, 100)
    assert budgets(make(), 5) == (5, 5, 5)
    assert budgets(make(), 30) == (8, 8, 8)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"window_size": 9, "capacity": 8}, r"window_size \(9\) must not exceed capacity \(8\)"),
        ({"window_size": 9, "tsp_length": 8}, r"window_size \(9\) must not exceed tsp_length \(8\)"),
        ({"window_size": 0}, "window_size must be an integer >= 1, got 0"),
        ({"window_size": -3}, "window_size must be an integer >= 1, got -3"),
        ({"window_size": 2.0}, "window_size must be an integer >= 1, got 2.0"),
        ({"kernel_size": 4}, "kernel_size must be an odd integer >= 1, got 4"),
        ({"kernel_size": 0}, "kernel_size must be an odd integer >= 1, got 0"),
        ({"pooling": "maxpool"}, "pooling must be 'max' or 'avg', got 'maxpool'"),
        ({"tsp_length": 40, "capacity": 41}, r"tsp_length \(40\) < capacity \(41\)"),
        ({"tsp_layer": -1}, "tsp_layer must be an integer >= 0, got -1"),
        ({"tsp_layer": 1.0}, "tsp_layer must be an integer >= 0, got 1.0"),
        ({"tsp_rate": 0}, r"tsp_rate must be in \(0, 1\], got 0"),
        ({"tsp_rate": -0.1}, r"tsp_rate must be in \(0, 1\], got -0.1"),
        ({"tsp_rate": 1.01}, r"tsp_rate must be in \(0, 1\], got 1.01"),
        ({"tsp_rate": math.nan}, r"tsp_rate must be in \(0, 1\], got nan"),
        ({"retention_rate": 0.0}, r"retention_rate must be in \(0, 1\], got 0.0"),
        ({"retention_rate": 20}, r"retention_rate must be in \(0, 1\], got 20"),
        ({"retention_rate": math.nan}, r"retention_rate must be in \(0, 1\], got nan"),
        ({"tsp_rate": 0.2, "tsp_length": 50}, "give one of tsp_rate and tsp_length; .* are both set"),
        ({"retention_rate": 0.2, "capacity": 50}, "give one of retention_rate and capacity; .* are both set"),
        ({"tsp_length": 50.0}, "tsp_length must be an integer >= 1, got 50.0"),
        ({"capacity": 0}, "capacity must be an integer >= 1, got 0"),
        ({"min_prompt_to_compress": -1}, "min_prompt_to_compress must be an integer >= 0, got -1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(chosen: dict[str, Any], message: str):
    with pytest.raises(fk.FastKVConfigError, match=message):
        fk.FastKV(**({"tsp_layer": 1} | chosen))


def test_the_published_form_allows_a_tsp_length_below_the_capacity():
    assert budgets(fk.FastKV.reference(tsp_layer=1, tsp_length=40, capacity=60), 100) == (60, 40, 40)


@pytest.mark.parametrize("layer", [3, 4, 100])
def test_the_tsp_layer_must_have_a_layer_after_it(layer: int):
    with pytest.raises(fk.FastKVConfigError, match=f"tsp_layer {layer} is outside 0…2 for a 4-layer model"):
        fk.FastKV(tsp_layer=layer).check(LAYERS)
    fk.FastKV(tsp_layer=2).check(LAYERS)


def test_the_published_form_allows_the_last_layer_but_no_later_one():
    fk.FastKV.reference(tsp_layer=3).check(LAYERS)
    with pytest.raises(fk.FastKVConfigError, match="tsp_layer 4 is outside 0…3"):
        fk.FastKV.reference(tsp_layer=4).check(LAYERS)


def test_retaining_more_than_is_propagated_warns():
    with pytest.warns(UserWarning, match=r"retention_rate \(0.5\) > tsp_rate \(0.2\): layers after 1 keep 0.2"):
        fk.FastKV(tsp_layer=1, tsp_rate=0.2, retention_rate=0.5)
    fk.FastKV.reference(tsp_layer=1, tsp_rate=0.2, retention_rate=0.5)  # published: no warning


def test_the_warning_names_the_callers_line():
    """In a process of its own: here a checked constructor stands between."""
    code = "import fastkv_jax as fk\n\nfk.FastKV(tsp_layer=1, tsp_rate=0.2, retention_rate=0.5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("<string>:3: UserWarning: retention_rate (0.5)")
