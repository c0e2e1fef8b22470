"""The cache as a pytree: its layers, its room, its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.cache.segment import SegmentKV, runs_of
from fastkv_jax.errors import FastKVConfigError, InputError
from kernels_pallas import gpu_backend

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
    return KVCache(segments, new, new, jnp.zeros((), jnp.int32), jnp.zeros(B, jnp.int32), jnp.full(B, 9))


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
    assert cache.nbytes == B * K * entries * (2 * D * 4 + 4) + 2 * 5 * B * K * M * D * 4 + 4 + 8 * B
    assert cache.replace(k_new=cache.k_new.astype(jnp.bfloat16)).nbytes == cache.nbytes - 5 * B * K * M * D * 2


def test_it_passes_through_jit_as_it_is(cache):
    found = jax.jit(lambda c: c)(cache)
    assert jax.tree.structure(found) == jax.tree.structure(cache)
    assert len(jax.tree.leaves(cache)) == 2 * 3 + 5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(cache), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def entries(heads, per_head, first=0):
    """One layer, one row: head h holds the positions first + h, first + h + heads, ...; keys say (head, position)."""
    positions = first + jnp.arange(per_head)[None] * heads + jnp.arange(heads)[:, None]
    owner = jnp.broadcast_to(jnp.arange(heads)[:, None], positions.shape)
    k = jnp.stack([owner, positions], axis=-1).astype(jnp.float32)[None, None]
    return SegmentKV(k, -k, positions[None, None].astype(jnp.int32))


def test_a_flat_cache_holds_the_same_entries_in_as_many_bytes():
    by_head = entries(3, 4)
    flat = by_head.flat(3)
    assert flat.k.shape == (1, 1, 1, 12, 2) and flat.sharing == 3
    assert sum(a.nbytes for a in jax.tree.leaves(flat)) == sum(a.nbytes for a in jax.tree.leaves(by_head))
    np.testing.assert_array_equal(flat.heads, flat.k[..., 0])  # whose each slot is
    back = flat.by_head()
    assert back.positions.shape == (1, 1, 3, 12) and back.heads is None and by_head.by_head() is by_head
    np.testing.assert_array_equal(back.positions[..., -4:], by_head.positions)
    np.testing.assert_array_equal(back.k[..., -4:, :], by_head.k)
    np.testing.assert_array_equal(back.v[..., -4:, :], by_head.v)
    assert (np.asarray(back.positions[..., :-4]) == -1).all()


@pytest.mark.parametrize("flat_first", [False, True])
def test_slots_are_joined_also_with_a_flat_cache(flat_first):
    old, new = entries(3, 4), entries(3, 2, first=50)
    joined = (old.flat(3) if flat_first else old).extended(new if flat_first else new.flat(3), 3).by_head()
    for head in range(3):
        kept = np.asarray(joined.positions)[0, 0, head]
        expected = [*np.asarray(old.positions)[0, 0, head], *np.asarray(new.positions)[0, 0, head]]
        assert kept[kept >= 0].tolist() == expected
        np.testing.assert_array_equal(np.asarray(joined.k)[0, 0, head][kept >= 0][:, 1], expected)


def test_a_cache_per_query_head_is_joined_by_repeating_the_other():
    joined = entries(4, 2).extended(entries(2, 3, first=20), 2)
    assert joined.k.shape == (1, 1, 4, 5, 2)
    np.testing.assert_array_equal(joined.positions[0, 0, :, 2:], [[20, 22, 24]] * 2 + [[21, 23, 25]] * 2)
    with pytest.raises(InputError, match="a cache of 4 heads cannot be joined with one that 2 share"):
        entries(4, 2).extended(entries(2, 3).flat(2), 2)


def test_decoded_tokens_become_prompt_entries(cache):
    assert cache.folded() is cache  # none yet
    k_new = jnp.broadcast_to(jnp.arange(M, dtype=jnp.float32)[:, None], (5, B, K, M, D))
    filled = jnp.array([2, 1])
    used = cache.replace(k_new=k_new, used=jnp.int32(2), filled=filled, position=jnp.array([11, 6]))
    folded = used.folded()
    assert folded.max_new_tokens == 0 and folded.edges == cache.edges == (0, 2, 5)
    np.testing.assert_array_equal(folded.position, used.position)
    for layer in range(5):
        old, new = cache.layer(layer), folded.layer(layer)
        np.testing.assert_array_equal(new.positions[..., :-M], old.positions)
        np.testing.assert_array_equal(new.positions[0, :, -M:], [[9, 10, -1]] * K)
        np.testing.assert_array_equal(new.positions[1, :, -M:], [[5, -1, -1]] * K)
        np.testing.assert_array_equal(new.k[..., -M:, :], k_new[layer])


def test_one_row_of_it(cache):
    row = cache.replace(position=jnp.array([4, 8])).row(1)
    assert row.position.tolist() == [8] and row.layer(0).k.shape == (1, K, 7, D)
    assert row.k_new.shape == (5, 1, K, M, D)


def test_layers_of_one_run(cache):
    assert cache.run(0, 2) is cache.segments[0]
    assert cache.run(3, 5).k.shape[0] == 2
    with pytest.raises(IndexError, match="layers 1..2 are not in one of the runs"):
        cache.run(1, 3)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_entries_of_8_bits_are_near_and_travel_with_their_scales(dtype):
    random = np.random.default_rng(0)
    k = jnp.asarray(random.normal(size=(1, 1, 3, 4, 8)), jnp.float32)
    whole = SegmentKV(k, 2 * k, entries(3, 4).positions)
    small = whole.quantized(dtype)
    assert small.k.dtype == dtype and small.k_scale.shape == (1, 1, 3, 4)
    size = lambda segment: sum(a.nbytes for a in jax.tree.leaves(segment))  # noqa: E731
    assert size(small) < 0.5 * size(whole)
    at_64 = SegmentKV(*2 * (jnp.zeros((1, 1, 3, 4, 64), jnp.bfloat16),), entries(3, 4).positions)
    assert size(at_64.quantized(dtype)) < 0.53 * size(at_64)
    near = small.dequantized(jnp.float32)
    np.testing.assert_allclose(near.k, k, rtol=0, atol=0.1)
    np.testing.assert_allclose(near.v, 2 * k, rtol=0, atol=0.2)
    joined = small.extended(whole, 3).dequantized(jnp.float32)
    np.testing.assert_array_equal(joined.k[..., :4, :], joined.k[..., 4:, :])
    flat = small.flat(3).dequantized(jnp.float32).by_head()
    np.testing.assert_array_equal(flat.k[..., -4:, :], near.k)
    wide = small.widened(6).dequantized(jnp.float32)
    np.testing.assert_array_equal(wide.k[..., -4:, :], near.k)
    assert (np.asarray(wide.positions[..., :2]) == -1).all() and whole.dequantized(jnp.float32) is whole


@pytest.mark.parametrize(
    ("layers", "elements", "runs"),
    [
        (32, 1 << 26, [32]),  # 2^31 together: 32 bits are enough
        (32, (1 << 26) + 1, [16, 16]),
        (32, 1 << 27, [16, 16]),  # 131,072 tokens of Llama-3.1-8B
        (32, (1 << 27) + 1, [32]),  # beyond 2^32 there are 64 bits
        (5, 3 << 28, [2, 2, 1]),  # of two runs one would be too large
        (2, 5 << 29, [2]),  # 2.5 * 2^30 alone would be too large, 5 * 2^30 is large enough
        (1, 1 << 31, [1]),
    ],
)
def test_runs_are_the_fewest_in_which_every_entry_is_found(layers: int, elements: int, runs: list[int]):
    assert runs_of(layers, elements, 1) == runs
    assert runs_of(layers, elements, 2) == [layers]


def test_a_layer_that_no_run_helps_is_refused():
    with pytest.raises(FastKVConfigError, match=r"a layer's keys are 3,221,225,472 numbers.* a smaller batch"):
        runs_of(1, 3 << 30, 1)


@pytest.fixture
def narrow(monkeypatch):
    """32 bits that are eight: arrays of one-byte numbers between 128 and 256 are not found."""
    monkeypatch.setattr(gpu_backend, "_NARROW_ELEMENTS", 1 << 7)
    monkeypatch.setattr(gpu_backend, "_NARROW_BYTES", 1 << 8)


@pytest.mark.usefixtures("narrow")
def test_only_segments_of_8_bits_are_cut_and_every_layer_stays_the_same(cache):
    assert cache.in_runs() is cache
    small = cache.replace(segments=tuple(segment.quantized("int8") for segment in cache.segments))
    cut = small.in_runs()  # 2 * 112 and 3 * 64 numbers
    assert [segment.k.shape[0] for segment in cut.segments] == [1, 1, 2, 1]
    halves = small.in_runs(jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))  # a head each: 112 and 96
    assert [segment.k.shape[0] for segment in halves.segments] == [2, 3]
    for index in range(5):
        for mine, other in zip(cut.layer(index), small.layer(index), strict=True):
            np.testing.assert_array_equal(mine, other)
