"""Decode attention: every implementation against float64 NumPy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_pallas
from tolerances import ATTENTION, ATTENTION_BF16

IMPLEMENTATIONS: dict[str, Callable] = {"public": jax.jit(kernels_pallas.decode_attention)}
BATCH, CAPACITY, NEW, DIM = 3, 12, 5, 8
every_implementation = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))


def expected(q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads=None):
    """[B, H, D], one head at a time, over the entries that are there."""
    batch, query_heads, dim = q.shape
    out = np.zeros(q.shape)
    for b, h in np.ndindex(batch, query_heads):
        n, kv = h // (query_heads // k_prompt.shape[1]), h // (query_heads // k_new.shape[1])
        there = positions[b, n] >= 0
        if heads is not None:
            there &= heads[b, 0] == kv
        keys = np.concatenate([k_prompt[b, n, there], k_new[b, kv, : filled[b]]])
        values = np.concatenate([v_prompt[b, n, there], v_new[b, kv, : filled[b]]])
        logits = keys @ q[b, h] / np.sqrt(dim)
        weights = np.exp(logits - logits.max())
        out[b, h] = weights / weights.sum() @ values
    return out


def inputs(seed: int, heads: int, cache_heads: int, kv_heads: int, empty, scale: float = 1.0):
    """`empty` [B, N] leading slots of each head hold nothing."""
    random = np.random.default_rng(seed)
    shapes = [(heads,), *[(cache_heads, CAPACITY)] * 2, *[(kv_heads, NEW)] * 2]
    q, k, v, k_new, v_new = (random.normal(size=(BATCH, *s, DIM)).astype(np.float32) for s in shapes)
    slots = np.broadcast_to(np.arange(CAPACITY, dtype=np.int32), (BATCH, cache_heads, CAPACITY))
    positions = np.where(slots < np.asarray(empty)[..., None], np.int32(-1), slots)
    return q * np.float32(scale), k, v, positions, k_new, v_new


def assert_agrees(implementation: str, given, filled, tolerance: float = ATTENTION, heads=None) -> None:
    filled = np.broadcast_to(np.int32(filled), (BATCH,))
    ours = IMPLEMENTATIONS[implementation](*given, filled, heads=heads)
    assert ours.dtype == given[0].dtype
    given = (a if i == 3 else np.asarray(a, np.float64) for i, a in enumerate(given))
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected(*given, filled, heads), rtol=0, atol=tolerance)


@every_implementation
@pytest.mark.parametrize("per_query_head", [False, True], ids=["a cache per KV head", "a cache per query head"])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
@given(
    empty=st.lists(st.integers(0, CAPACITY), min_size=24, max_size=24),
    filled=st.lists(st.integers(1, NEW), min_size=BATCH, max_size=BATCH),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_agrees_for_ragged_heads(implementation, group, per_query_head, empty, filled, seed):
    """Heads may hold different numbers of entries, and none at all; rows may have decoded different numbers."""
    cache_heads = 2 * group if per_query_head else 2
    empty = np.resize(empty, (BATCH, cache_heads))
    assert_agrees(implementation, inputs(seed, 2 * group, cache_heads, 2, empty), filled)


@every_implementation
def test_without_prompt_entries_only_the_new_tokens_count(implementation: str):
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, np.full((BATCH, 2), CAPACITY))
    ours = IMPLEMENTATIONS[implementation](q, k, v, positions, k_new, v_new, np.full(BATCH, 1, np.int32))
    np.testing.assert_allclose(ours, np.repeat(v_new[:, :, 0], 2, axis=1), rtol=0, atol=ATTENTION)


@every_implementation
def test_what_stands_in_empty_slots_and_unused_ones_does_not_count(implementation: str):
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, [[3, 0], [12, 5], [1, 1]])
    run = IMPLEMENTATIONS[implementation]
    clean = np.asarray(run(q, k, v, positions, k_new, v_new, np.full(BATCH, 2, np.int32)))
    k, v = (np.where((positions < 0)[..., None], np.float32(1e3), x) for x in (k, v))
    k_new[:, :, 2:], v_new[:, :, 2:] = 1e3, 1e3
    np.testing.assert_array_equal(run(q, k, v, positions, k_new, v_new, np.full(BATCH, 2, np.int32)), clean)


@every_implementation
def test_empty_slots_may_stand_anywhere(implementation: str):
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, np.zeros((BATCH, 2)))
    positions = np.where(np.arange(CAPACITY) % 3 == 1, np.int32(-1), positions)
    assert_agrees(implementation, (q, k, v, positions, k_new, v_new), 3)


@every_implementation
@pytest.mark.parametrize("group", [1, 2, 3])
def test_in_a_flat_cache_a_query_sees_the_slots_of_its_head(implementation: str, group: int):
    given = inputs(0, 3 * group, 1, 3, [[2], [0], [CAPACITY]])
    heads = np.random.default_rng(1).integers(0, 3, (BATCH, 1, CAPACITY)).astype(np.int32)
    assert_agrees(implementation, given, 3, heads=heads)


def test_heads_of_slots_are_for_flat_caches():
    q, *rest = inputs(0, 4, 2, 2, np.zeros((BATCH, 2)))
    heads = np.zeros((BATCH, 1, CAPACITY), np.int32)
    with pytest.raises(ValueError, match="heads are for a flat cache, N = 1, not 2"):
        kernels_pallas.decode_attention(q, *rest, np.ones(BATCH, np.int32), heads=heads)


@every_implementation
def test_large_logits_do_not_overflow(implementation: str):
    assert_agrees(implementation, inputs(0, 4, 2, 2, np.zeros((BATCH, 2)), scale=1e3), 3, tolerance=1e-4)


@every_implementation
def test_bfloat16_is_near(implementation: str):
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, [[3, 0], [12, 5], [1, 1]])
    q, k, v, k_new, v_new = (x.astype(jnp.bfloat16) for x in (q, k, v, k_new, v_new))
    assert_agrees(implementation, (q, k, v, positions, k_new, v_new), 3, ATTENTION_BF16)


def test_heads_that_do_not_divide_are_refused():
    q, *rest = inputs(0, 5, 2, 2, np.zeros((BATCH, 2)))
    with pytest.raises(ValueError, match="5 query heads over 2 and 2"):
        kernels_pallas.decode_attention(q, *rest, np.ones(BATCH, np.int32))
