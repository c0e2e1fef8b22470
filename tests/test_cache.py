"""The cache as a pytree: its layers, its room, its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax.cache import KVCache, SegmentKV

B, K, D, M = 2, 2, 4, 3


def segment(layers, capacity, first):
    """Every entry of layer i holds i."""
    number = jnp.arange(first, first + layers, dtype=jnp.float32)[:, None, None, None]
    k = jnp.broadcast_to(number[..., None], (layers, B, K, capacity, D))
    positions = jnp.broadcast_to(number.astype(jnp.int32), (layers, B, K, capacity))
    return SegmentKV(k, -k, positions)


@pytest.fixture
def cache():
    new = jnp.zeros((5, B, K, M, D))
    segments = (segment(2, 7, 0), segment(3, 4, 2))
    return KVCache(segments, new, new, jnp.zeros((), jnp.int32), jnp.full(B, 9))


@pytest.mark.parametrize(("index", "capacity"), [(0, 7), (1, 7), (2, 4), (4, 4)])
def test_a_layer_is_found_across_segments(cache, index, capacity):
    found = cache.layer(index)
    assert found.k.shape == found.v.shape == (B, K, capacity, D) and found.positions.shape == (B, K, capacity)
    assert (np.asarray(found.k) == index).all() and (np.asarray(found.v) == -index).all()
    assert (np.asarray(found.positions) == index).all()


@pytest.mark.parametrize("index", [-1, 5, 99])
def test_a_layer_that_is_not_there_is_named(cache, index):
    with pytest.raises(IndexError, match=rf"layer {index} is outside 0\.\.4"):
        cache.layer(index)


def test_its_room_and_its_bytes(cache):
    assert cache.max_new_tokens == M
    entries = 2 * 7 + 3 * 4
    assert cache.nbytes == B * K * entries * (2 * D * 4 + 4) + 2 * 5 * B * K * M * D * 4 + 4 + 4 * B
    assert cache.replace(k_new=cache.k_new.astype(jnp.bfloat16)).nbytes == cache.nbytes - 5 * B * K * M * D * 2


def test_it_passes_through_jit_as_it_is(cache):
    found = jax.jit(lambda c: c)(cache)
    assert jax.tree.structure(found) == jax.tree.structure(cache)
    assert len(jax.tree.leaves(cache)) == 2 * 3 + 4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(cache), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
