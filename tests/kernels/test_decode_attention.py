"""Decode attention: every implementation against float64 NumPy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import jit

import kernels_pallas
from kernels_pallas import Slots
from kernels_pallas.decode_attention import gpu, reference, tpu
from tolerances import ATTENTION, ATTENTION_BF16, ATTENTION_LARGE


def run_with(run: Callable, **choice) -> Callable:
    """An implementation with a choice of tiles, its arrays one by one as the oracle has them."""

    @jit
    def decode_attention(
        q, k, v, positions, k_new, v_new, filled, heads=None, k_scale=None, v_scale=None, *, layer=None
    ):
        prompt, new = Slots(k, v, positions, heads, k_scale, v_scale), Slots(k_new, v_new)
        if layer is None:
            prompt, new = jax.tree.map(lambda a: a[None], (prompt, new))
            layer = jnp.int32(0), jnp.int32(0)
        return run(q, prompt, new, filled, layer, **choice)

    return decode_attention


# Small tiles, so that 13 slots are several of them; the tiles of a real chip are compiled in test_compile.py.
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": run_with(reference.decode_attention),
    "tpu": run_with(tpu.decode_attention, interpret=True, tiles=tpu.Tiles(slots=4)),
    "gpu": run_with(gpu.decode_attention, interpret=True, tiles=gpu.Tiles(rows=2, slots=4, splits=2)),
}
BATCH, CAPACITY, NEW, DIM = 2, 13, 5, 8
every_implementation = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))


def expected(q, k_prompt, v_prompt, positions, k_new, v_new, filled, heads=None, k_scale=None, v_scale=None):
    """[B, H, D], one head at a time, over the entries that are there."""
    if k_scale is not None:
        k_prompt, v_prompt = k_prompt * np.float64(k_scale)[..., None], v_prompt * np.float64(v_scale)[..., None]
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


def inputs(seed: int, heads: int, cache_heads: int, kv_heads: int, empty=0, capacity=CAPACITY, dim=DIM, scale=1.0):
    """`empty` [B, N] leading slots of each head hold nothing."""
    random = np.random.default_rng(seed)
    shapes = [(heads,), *[(cache_heads, capacity)] * 2, *[(kv_heads, NEW)] * 2]
    q, k, v, k_new, v_new = (random.normal(size=(BATCH, *s, dim)).astype(np.float32) for s in shapes)
    slots = np.broadcast_to(np.arange(capacity, dtype=np.int32), (BATCH, cache_heads, capacity))
    positions = np.where(slots < np.asarray(empty)[..., None], np.int32(-1), slots)
    return q * np.float32(scale), k, v, positions, k_new, v_new


def assert_agrees(implementation: str, given, filled, tolerance: float = ATTENTION, **more) -> None:
    filled = np.broadcast_to(np.int32(filled), (BATCH,))
    ours = IMPLEMENTATIONS[implementation](*given, filled, **more)
    assert ours.dtype == given[0].dtype and ours.shape == given[0].shape
    given = (a if i == 3 else np.asarray(a, np.float64) for i, a in enumerate(given))
    theirs = expected(*given, filled, **{name: np.asarray(x) for name, x in more.items()})
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=tolerance)


@every_implementation
@pytest.mark.parametrize(
    ("group", "per_query_head"), [(1, False), (2, True), (3, False), (3, True), (4, False), (8, False)]
)
@given(
    empty=st.lists(st.integers(0, CAPACITY), min_size=16, max_size=16),
    filled=st.lists(st.integers(1, NEW), min_size=BATCH, max_size=BATCH),
    seed=st.integers(0, 99),
)
@settings(max_examples=3, deadline=None)
def test_agrees_for_ragged_heads(implementation, group, per_query_head, empty, filled, seed):
    """Heads may hold different numbers of entries, and none at all; rows may have decoded different numbers."""
    cache_heads = 2 * group if per_query_head else 2
    empty = np.resize(empty, (BATCH, cache_heads))
    assert_agrees(implementation, inputs(seed, 2 * group, cache_heads, 2, empty), filled)


@every_implementation
@pytest.mark.parametrize(
    ("capacity", "dim", "dtype"),
    [(1, 64, jnp.float32), (3, 80, jnp.bfloat16), (4, 128, jnp.float32), (5, 256, jnp.bfloat16), (0, 64, jnp.bfloat16)],
)
def test_agrees_for_every_head_size_and_dtype_at_the_edges_of_tiles(implementation, capacity, dim, dtype):
    """bfloat16: the oracle gets the same rounded inputs."""
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, capacity=capacity, dim=dim)
    q, k, v, k_new, v_new = (x.astype(dtype) for x in (q, k, v, k_new, v_new))
    tolerance = ATTENTION if dtype == jnp.float32 else ATTENTION_BF16
    assert_agrees(implementation, (q, k, v, positions, k_new, v_new), [3, 5], tolerance)


@every_implementation
@pytest.mark.parametrize(
    ("dtype", "cache"), [(jnp.float32, jnp.int8), (jnp.float32, jnp.float8_e4m3fn), (jnp.bfloat16, jnp.int8)]
)
def test_agrees_for_caches_of_8_bits(implementation, cache, dtype):
    """The oracle gets the same quantized entries."""
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, [[3, 0], [13, 5]])
    (k, k_scale), (v, v_scale) = (kernels_pallas.quantize(jnp.asarray(x) * 3, cache) for x in (k, v))
    q, k_new, v_new = (x.astype(dtype) for x in (q, k_new, v_new))
    tolerance = 3 * (ATTENTION if dtype == jnp.float32 else ATTENTION_BF16)  # values three times the usual
    given = (q, k, v, positions, k_new, v_new)
    assert_agrees(implementation, given, 3, tolerance, k_scale=k_scale, v_scale=v_scale)


@every_implementation
def test_scales_do_not_vanish_in_half_precision(implementation):
    """A weight of 2e-4 times a scale of 8e-5 is nothing in float16; 2,047 such entries are most of the result."""
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, capacity=2048, dim=64)
    k[:], k[:, :, 0], q[:] = 0, 1, 1.0625  # the first entry's logit is 8.5, the others' are 0
    v = 0.01 + 0.001 * v
    v[:, :, 0] = 1e-3
    (k, k_scale), (v, v_scale) = (kernels_pallas.quantize(jnp.asarray(x), jnp.int8) for x in (k, v))
    q, k_new, v_new = (x.astype(jnp.float16) for x in (q, k_new - k_new, 0 * v_new))
    run, filled = IMPLEMENTATIONS[implementation], np.int32([1, 1])
    ours = run(q, k, v, positions, k_new, v_new, filled, k_scale=k_scale, v_scale=v_scale)
    given = (np.asarray(a, np.float64) for a in (q, k, v))
    exact = expected(*given, positions, np.float64(k_new), np.float64(v_new), filled, None, k_scale, v_scale)
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=0.02)


@pytest.mark.parametrize("implementation", ["gpu"])
@pytest.mark.parametrize("filled", [NEW + 1, NEW + 9])
def test_more_than_the_buffer_holds_is_not_read(implementation, filled):
    """Where the number of new tokens runs ahead, as in a row that has ended: slots behind the last are others'."""
    given = inputs(1, 4, 2, 2)
    run = IMPLEMENTATIONS[implementation]
    np.testing.assert_array_equal(run(*given, np.int32([filled] * 2)), run(*given, np.int32([NEW] * 2)))


@every_implementation
@pytest.mark.parametrize("cache", [jnp.float32, jnp.int8])
def test_a_layer_is_read_where_it_is_among_others(implementation: str, cache):
    """Three layers of prompt entries, two of new ones; heads and scales, too, are of all layers."""
    layers = [inputs(seed, 6, 1, 3, [[seed], [4]]) for seed in range(3)]
    q = layers[0][0]
    k, v, positions, k_new, v_new = (jnp.stack([layer[i] for layer in layers]) for i in range(1, 6))
    heads = np.random.default_rng(1).integers(0, 3, (3, BATCH, 1, CAPACITY)).astype(np.int32)
    more = {"heads": heads}
    if cache == jnp.int8:
        (k, more["k_scale"]), (v, more["v_scale"]) = (kernels_pallas.quantize(x, cache) for x in (k, v))
    run, filled = IMPLEMENTATIONS[implementation], np.int32([2, 5])
    for i, j in ((0, 1), (2, 0)):
        which = np.int32(i), np.int32(j)
        ours = run(q, k, v, positions, k_new[:2], v_new[:2], filled, **more, layer=which)
        mine = {name: a[i] for name, a in more.items()}
        alone = run(q, k[i], v[i], positions[i], k_new[j], v_new[j], filled, **mine)
        np.testing.assert_array_equal(ours, alone)


@every_implementation
def test_without_prompt_entries_only_the_new_tokens_count(implementation: str):
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, np.full((BATCH, 2), CAPACITY))
    ours = IMPLEMENTATIONS[implementation](q, k, v, positions, k_new, v_new, np.full(BATCH, 1, np.int32))
    np.testing.assert_allclose(ours, np.repeat(v_new[:, :, 0], 2, axis=1), rtol=0, atol=ATTENTION)


@every_implementation
def test_what_stands_in_empty_slots_and_unused_ones_does_not_count(implementation: str):
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2, [[3, 0], [13, 5]])
    run = IMPLEMENTATIONS[implementation]
    clean = np.asarray(run(q, k, v, positions, k_new, v_new, np.full(BATCH, 2, np.int32)))
    k, v = (np.where((positions < 0)[..., None], np.float32(1e3), x) for x in (k, v))
    k_new[:, :, 2:], v_new[:, :, 2:] = 1e3, 1e3
    np.testing.assert_array_equal(run(q, k, v, positions, k_new, v_new, np.full(BATCH, 2, np.int32)), clean)


@every_implementation
def test_empty_slots_may_stand_anywhere(implementation: str):
    q, k, v, positions, k_new, v_new = inputs(0, 4, 2, 2)
    positions = np.where(np.arange(CAPACITY) % 3 == 1, np.int32(-1), positions)
    assert_agrees(implementation, (q, k, v, positions, k_new, v_new), 3)


@every_implementation
@pytest.mark.parametrize("group", [1, 3])
def test_in_a_flat_cache_a_query_sees_the_slots_of_its_head(implementation: str, group: int):
    given = inputs(0, 3 * group, 1, 3, [[2], [0]])
    heads = np.random.default_rng(1).integers(0, 3, (BATCH, 1, CAPACITY)).astype(np.int32)
    assert_agrees(implementation, given, 3, heads=heads)


@every_implementation
def test_a_flat_cache_of_8_bits(implementation: str):
    q, k, v, *rest = inputs(0, 6, 1, 3, [[2], [0]])
    heads = np.repeat(np.int32([[[0]], [[2]]]), CAPACITY, axis=2)  # all slots belong to one head, the others have none
    (k, k_scale), (v, v_scale) = (kernels_pallas.quantize(jnp.asarray(x), jnp.int8) for x in (k, v))
    assert_agrees(implementation, (q, k, v, *rest), 3, heads=heads, k_scale=k_scale, v_scale=v_scale)


@pytest.mark.usefixtures("own_checks_only")
def test_heads_of_slots_are_for_flat_caches():
    q, *rest = inputs(0, 4, 2, 2)
    heads = np.zeros((BATCH, 1, CAPACITY), np.int32)
    with pytest.raises(ValueError, match="heads are for a flat cache, N = 1, not 2"):
        kernels_pallas.decode_attention(q, Slots(*rest[:3], heads), Slots(*rest[3:]), np.ones(BATCH, np.int32))


@every_implementation
def test_large_logits_do_not_overflow(implementation: str):
    assert_agrees(implementation, inputs(0, 4, 2, 2, scale=1e3), 3, tolerance=ATTENTION_LARGE)


@pytest.mark.usefixtures("own_checks_only")
def test_a_cache_of_8_bits_and_its_scales_come_together():
    q, k, v, *rest = inputs(0, 4, 2, 2)
    scale = np.ones((BATCH, 2, CAPACITY), np.float32)
    filled = np.ones(BATCH, np.int32)
    for dtype, k_scale, v_scale in ((np.float32, scale, scale), (np.int8, None, None), (np.int8, scale, None)):
        k, v = k.astype(dtype), v.astype(dtype)
        with pytest.raises(ValueError, match="8 bits needs both scales, others none"):
            prompt = Slots(k, v, rest[0], None, k_scale, v_scale)
            kernels_pallas.decode_attention(q, prompt, Slots(*rest[1:]), filled)


@pytest.mark.usefixtures("own_checks_only")
def test_layers_and_the_number_of_one_come_together():
    q, k, v, positions, *new = inputs(0, 4, 2, 2)
    filled, layer = np.ones(BATCH, np.int32), (np.int32(0), np.int32(0))
    with pytest.raises(ValueError, match="entries of 4 and 4 axes; 5 with layer, else 4"):
        kernels_pallas.decode_attention(q, Slots(k, v, positions), Slots(*new), filled, layer)
    with pytest.raises(ValueError, match="entries of 5 and 4 axes"):
        kernels_pallas.decode_attention(q, Slots(k[None], v[None], positions[None]), Slots(*new), filled)


@pytest.mark.usefixtures("own_checks_only")
def test_heads_that_do_not_divide_are_refused():
    q, *rest = inputs(0, 5, 2, 2)
    with pytest.raises(ValueError, match="5 query heads over 2 and 2"):
        kernels_pallas.decode_attention(q, Slots(*rest[:3]), Slots(*rest[3:]), np.ones(BATCH, np.int32))
