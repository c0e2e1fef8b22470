"""Window scores: every implementation against float64 NumPy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import jit

import kernels_pallas
from kernels_pallas.window_scores import gpu, tpu
from tolerances import SCORES, SCORES_RELATIVE


def interpreted(run: Callable, **choice) -> Callable:
    return jit(functools.partial(run, interpret=True, **choice), static_argnames=("kernel_size", "pooling"))


# Small tiles, so that 40 tokens are several of them; the tiles of a real chip are compiled in test_compile.py.
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": jax.jit(kernels_pallas.window_scores, static_argnames=("kernel_size", "pooling")),
    "tpu": interpreted(tpu.window_scores, tiles=tpu.Tiles(keys=16, chunk=8, keep=True)),
    "tpu in two sweeps": interpreted(tpu.window_scores, tiles=tpu.Tiles(keys=16, chunk=8, keep=False)),
    "gpu": interpreted(gpu.window_scores, tiles=gpu.Tiles(heads=2, keys=8, splits=3)),
}
BATCH, TOKENS, WINDOW, DIM = 2, 40, 8, 4
every_implementation = pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if "sweeps" not in i])
edges = st.lists(st.tuples(st.integers(0, TOKENS), st.integers(0, TOKENS)), min_size=BATCH, max_size=BATCH)


def expected(q, k, start, stop, kernel_size, pooling):
    """[B, K, T], one query, one key and one column at a time."""
    batch, heads, window, dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    summed = np.zeros((batch, heads, tokens))
    for b, h, w in np.ndindex(batch, heads, window):
        row = stop[b] - window + w  # the column this query sits at
        seen = np.arange(start[b], max(start[b], row + 1))
        if not seen.size:
            continue
        logits = k[b, h // (heads // kv_heads), seen] @ q[b, h, w] / np.sqrt(dim)
        weights = np.exp(logits - logits.max())
        summed[b, h, seen] += weights / weights.sum()
    scores = np.zeros((batch, kv_heads, tokens))
    for b, h in np.ndindex(batch, heads):
        summed[b, h, max(0, stop[b] - window) :] = 0.0  # the window is no candidate
        padded = np.pad(summed[b, h], kernel_size // 2)
        views = np.lib.stride_tricks.sliding_window_view(padded, kernel_size)
        scores[b, h // (heads // kv_heads)] += views.max(axis=-1) if pooling == "max" else views.mean(axis=-1)
    return scores


def inputs(seed: int, heads: int, kv_heads: int, tokens: int = TOKENS, window: int = WINDOW, dim: int = DIM):
    random = np.random.default_rng(seed)
    q = random.normal(size=(BATCH, heads, window, dim)).astype(np.float32) * np.float32(2)
    return q, random.normal(size=(BATCH, kv_heads, tokens, dim)).astype(np.float32)


def assert_agrees(implementation: str, q, k, start, stop, kernel_size: int, pooling: str) -> None:
    start, stop = np.asarray(start, np.int32), np.asarray(stop, np.int32)
    ours = IMPLEMENTATIONS[implementation](q, k, start, stop, kernel_size=kernel_size, pooling=pooling)
    assert ours.dtype == jnp.float32
    assert (np.asarray(ours) >= 0).all()
    theirs = expected(q.astype(np.float64), k.astype(np.float64), start, stop, kernel_size, pooling)
    np.testing.assert_allclose(ours, theirs, rtol=SCORES_RELATIVE, atol=SCORES)


@every_implementation
@pytest.mark.parametrize(
    ("group", "kernel_size", "pooling"), [(1, 1, "max"), (2, 5, "max"), (3, 7, "avg"), (4, 49, "max"), (8, 63, "avg")]
)
@given(edges=edges, seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None)
def test_agrees_for_ragged_rows(implementation, group, kernel_size, pooling, edges, seed):
    """start may lie at, behind or in the window, and at the end: a row of padding alone scores 0."""
    start, stop = zip(*edges, strict=True)
    q, k = inputs(seed, heads=2 * group, kv_heads=2)
    assert_agrees(implementation, q, k, start, stop, kernel_size, pooling)


@every_implementation
@pytest.mark.parametrize(
    ("tokens", "window", "dim", "dtype"),
    [
        (15, 1, 64, jnp.float32),
        (16, 3, 80, jnp.bfloat16),
        (17, 16, 128, jnp.float32),
        (31, 8, 256, jnp.bfloat16),
        (33, 64, 64, jnp.bfloat16),  # a window longer than the prompt
        (1, 8, 64, jnp.float32),
    ],
)
def test_agrees_for_every_window_head_size_and_dtype_at_the_edges_of_tiles(implementation, tokens, window, dim, dtype):
    """bfloat16 inputs are scored in float32: the oracle gets the same rounded inputs."""
    q, k = (x.astype(dtype) for x in inputs(0, heads=2, kv_heads=1, tokens=tokens, window=window, dim=dim))
    assert_agrees(implementation, q, k, [0, tokens // 3], [tokens, tokens - tokens // 5], 5, "max")


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize(
    ("start", "stop"),
    [((0, 31), (40, 40)), ((32, 33), (40, 40)), ((0, 39), (8, 40)), ((40, 5), (40, 15)), ((16, 24), (32, 33))],
    ids=str,
)
def test_agrees_at_the_edges(implementation: str, start, stop):
    q, k = inputs(0, heads=4, kv_heads=2)
    assert_agrees(implementation, q, k, start, stop, 5, "max")


@every_implementation
def test_large_logits_do_not_overflow(implementation: str):
    q, k = inputs(0, heads=4, kv_heads=2)
    q *= np.float32(5e3)
    for start, stop in ((0, 3), (40, 40)), ((20, 30), (35, 40)):
        assert_agrees(implementation, q, k, start, stop, 5, "max")


@every_implementation
def test_padding_and_the_rows_after_the_window_do_not_count(implementation: str):
    q, k = inputs(0, heads=4, kv_heads=2)
    start, stop = np.full(BATCH, 10, np.int32), np.full(BATCH, 35, np.int32)
    run = IMPLEMENTATIONS[implementation]
    clean = np.asarray(run(q, k, start, stop, kernel_size=5, pooling="max"))
    k[:, :, :10], k[:, :, 35:] = 1e3, -1e3
    np.testing.assert_array_equal(run(q, k, start, stop, kernel_size=5, pooling="max"), clean)


@pytest.mark.usefixtures("own_checks_only")
def test_shapes_and_settings_that_cannot_be_are_refused():
    q, k = inputs(0, heads=4, kv_heads=3)
    edges = np.zeros(BATCH, np.int32), np.full(BATCH, TOKENS, np.int32)
    with pytest.raises(ValueError, match="do not form GQA groups"):
        kernels_pallas.window_scores(q, k, *edges, kernel_size=5, pooling="max")
    q, k = inputs(0, heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="do not form GQA groups"):
        kernels_pallas.window_scores(q, k[..., :2], *edges, kernel_size=5, pooling="max")
    for kernel_size, pooling in ((4, "max"), (0, "max"), (5, "mean")):
        with pytest.raises(ValueError, match="must be odd, pooling"):
            kernels_pallas.window_scores(q, k, *edges, kernel_size=kernel_size, pooling=pooling)
