"""Exact top-k: every implementation against a stable sort."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from interpreted import jit

import kernels_pallas
from kernels_pallas.select import gpu, tpu

# Tiles of 1,024 scores; the tiles of a real chip are compiled in test_compile.py.
TPU = {"interpret": True, "tiles": tpu.Tiles(rows=8)}
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": jax.jit(kernels_pallas.select, static_argnames=("capacity",)),
    "tpu": jit(functools.partial(tpu.select, **TPU), static_argnames=("capacity",)),
    "gpu": jax.jit(gpu.select, static_argnames=("capacity",)),
}
MARKS: dict[str, Callable] = {
    "reference": jax.jit(kernels_pallas.among_best),
    "tpu": jit(functools.partial(tpu.among_best, **TPU)),
    "gpu": jax.jit(gpu.among_best),
}
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
@settings(max_examples=15, deadline=None)
def test_agrees_with_a_stable_sort(implementation: str, scores: np.ndarray, count: list[int]):
    chosen = IMPLEMENTATIONS[implementation](scores, np.array(count, np.int32), capacity=CAPACITY)
    np.testing.assert_array_equal(chosen, expected(scores, np.array(count), CAPACITY))
    assert chosen.dtype == jnp.int32


@every_implementation
@pytest.mark.parametrize(
    ("tokens", "capacity"), [(1, 1), (1023, 300), (1024, 1024), (1025, 1023), (2049, 1025)], ids=str
)
def test_agrees_on_many_scores_that_tie_at_the_threshold(implementation: str, tokens: int, capacity: int):
    """At the edges of tiles, and with every distance the chosen may have to move."""
    scores = np.random.default_rng(0).integers(-20, 20, (2, tokens)).astype(np.float32)
    count = np.array([capacity, capacity * 7 // 9], np.int32)
    chosen = IMPLEMENTATIONS[implementation](scores, count, capacity=capacity)
    np.testing.assert_array_equal(chosen, expected(scores, count, capacity))


@every_implementation
@pytest.mark.parametrize("best", ["first", "last", "every third"])
def test_the_best_may_stand_together_or_apart(implementation: str, best: str):
    """The longest ways through the network: from the first column to the last slot."""
    columns = np.arange(3000)
    first = columns < 1000
    scores = np.where({"first": first, "last": first[::-1], "every third": columns % 3 == 1}[best], 2.0, 1.0)
    scores, count = scores[None].astype(np.float32), np.array([1000], np.int32)
    chosen = IMPLEMENTATIONS[implementation](scores, count, capacity=1100)
    np.testing.assert_array_equal(chosen, expected(scores, count, 1100))


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


@every_implementation
@given(scores=values, count=counts)
@settings(max_examples=5, deadline=None)
def test_among_best_marks_what_select_chooses(implementation: str, scores: np.ndarray, count: list[int]):
    marked = np.asarray(MARKS[implementation](scores, np.array(count, np.int32)))
    chosen = expected(scores, np.array(count), CAPACITY)
    assert marked.dtype == bool
    for row, few in enumerate(count):
        assert np.flatnonzero(marked[row]).tolist() == chosen[row, CAPACITY - few :].tolist()


@every_implementation
def test_among_best_keeps_leading_axes_and_may_take_every_column(implementation: str):
    scores = np.random.default_rng(0).integers(0, 3, (2, 1, 1025)).astype(np.float32)
    marked = np.asarray(MARKS[implementation](scores, np.array([[1025], [0]], np.int32)))
    assert marked.shape == scores.shape and marked[0].all() and not marked[1].any()


@pytest.mark.usefixtures("own_checks_only")
@pytest.mark.parametrize("capacity", [0, TOKENS + 1])
def test_a_capacity_that_cannot_be_is_refused(capacity: int):
    with pytest.raises(ValueError, match=f"capacity {capacity} is outside 1..{TOKENS}"):
        kernels_pallas.select(np.zeros((1, TOKENS), np.float32), np.ones(1, np.int32), capacity)
