"""Exact top-k: every implementation against a stable sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import kernels_pallas

IMPLEMENTATIONS: dict[str, Callable] = {"public": jax.jit(kernels_pallas.select, static_argnames=("capacity",))}
ROWS, TOKENS, CAPACITY = 3, 24, 16
every_implementation = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
any_float = st.floats(width=32, allow_nan=False, allow_subnormal=False)  # infinities, both zeros, all magnitudes
few_values = st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1.0, 1.0000001, np.inf])  # ties everywhere
values = arrays(np.float32, (ROWS, TOKENS), elements=any_float) | arrays(
    np.float32, (ROWS, TOKENS), elements=few_values
)
counts = st.lists(st.integers(0, CAPACITY), min_size=ROWS, max_size=ROWS)


def expected(scores: np.ndarray, count: np.ndarray, capacity: int) -> np.ndarray:
    """[rows, capacity]: the first `count` of a stable falling sort, ascending, after the empty slots."""
    out = np.full((len(scores), capacity), -1)
    for row, few in enumerate(count):
        best = np.argsort(-scores[row], kind="stable")[:few]
        out[row, capacity - few :] = np.sort(best)
    return out


@every_implementation
@given(scores=values, count=counts)
@settings(max_examples=200, deadline=None)
def test_agrees_with_a_stable_sort(implementation: str, scores: np.ndarray, count: list[int]):
    chosen = IMPLEMENTATIONS[implementation](scores, np.array(count, np.int32), capacity=CAPACITY)
    np.testing.assert_array_equal(chosen, expected(scores, np.array(count), CAPACITY))
    assert chosen.dtype == jnp.int32


@every_implementation
def test_agrees_on_many_scores_that_tie_at_the_threshold(implementation: str):
    scores = np.random.default_rng(0).integers(0, 40, (2, 5000)).astype(np.float32)
    count = np.array([1000, 777], np.int32)
    chosen = IMPLEMENTATIONS[implementation](scores, count, capacity=1024)
    np.testing.assert_array_equal(chosen, expected(scores, count, 1024))


@every_implementation
def test_neighbouring_floats_are_told_apart(implementation: str):
    one = np.float32(1.0)
    scores = np.array([[np.nextafter(one, 0), one, np.nextafter(one, 2), -one, np.nextafter(-one, 0)]], np.float32)
    for few, best in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 4])):
        chosen = np.asarray(IMPLEMENTATIONS[implementation](scores, np.array([few], np.int32), capacity=5))
        assert chosen[0].tolist() == [-1] * (5 - few) + best


@every_implementation
def test_leading_axes_are_independent(implementation: str):
    scores = np.random.default_rng(0).normal(size=(2, 3, TOKENS)).astype(np.float32)
    count = np.arange(6, dtype=np.int32).reshape(2, 3)
    chosen = IMPLEMENTATIONS[implementation](scores, count, capacity=CAPACITY)
    flat = expected(scores.reshape(6, TOKENS), count.reshape(6), CAPACITY)
    np.testing.assert_array_equal(chosen, flat.reshape(2, 3, CAPACITY))


@every_implementation
def test_the_example_of_its_documentation(implementation: str):
    scores = np.array([5.0, 1.0, 9.0, 9.0, 2.0], np.float32)
    chosen = IMPLEMENTATIONS[implementation](scores, np.int32(3), capacity=4)
    assert np.asarray(chosen).tolist() == [-1, 0, 2, 3]


@given(scores=values, count=counts)
@settings(max_examples=50, deadline=None)
def test_among_best_marks_what_select_chooses(scores: np.ndarray, count: list[int]):
    marked = np.asarray(jax.jit(kernels_pallas.among_best)(scores, np.array(count, np.int32)))
    chosen = np.asarray(kernels_pallas.select(scores, np.array(count, np.int32), CAPACITY))
    for row, few in enumerate(count):
        assert np.flatnonzero(marked[row]).tolist() == chosen[row, CAPACITY - few :].tolist()


@pytest.mark.parametrize("capacity", [0, TOKENS + 1])
def test_a_capacity_that_cannot_be_is_refused(capacity: int):
    with pytest.raises(ValueError, match=f"capacity {capacity} is outside 1..{TOKENS}"):
        kernels_pallas.select(np.zeros((1, TOKENS), np.float32), np.ones(1, np.int32), capacity)
