"""Rotary embedding against float64 NumPy, and its scaling against the published rule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax.model import rope
from fastkv_jax.model.config import Llama3Scaling, RopeConfig

PLAIN = RopeConfig(10000.0, None)
LLAMA31 = RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def published_scaling(freqs, s):
    """apply_scaling of the Llama 3.1 release (model.py), transcribed."""
    low_freq_wavelen = s.original_max_position_embeddings / s.low_freq_factor
    high_freq_wavelen = s.original_max_position_embeddings / s.high_freq_factor
    new_freqs = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < high_freq_wavelen:
            new_freqs.append(freq)
        elif wavelen > low_freq_wavelen:
            new_freqs.append(freq / s.factor)
        else:
            smooth = (s.original_max_position_embeddings / wavelen - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            new_freqs.append((1 - smooth) * freq / s.factor + smooth * freq)
    return np.array(new_freqs)


def plain_frequencies(theta, dim):
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def rotated(x, positions, frequencies):
    """Each pair (d, d + D/2) as a complex number times e^(i position frequency); x [B, N, T, D], positions [B, T]."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None, :, None] * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("dim", [2, 12, 64, 128])
@pytest.mark.parametrize("theta", [500.0, 10000.0, 1e6])
def test_plain_frequencies(dim, theta):
    found = rope.frequencies(RopeConfig(theta, None), dim)
    assert found.dtype == np.float32 and found.shape == (dim // 2,) and found[0] == 1
    np.testing.assert_allclose(found, plain_frequencies(theta, dim), rtol=1e-7)


@pytest.mark.parametrize("scaling", [LLAMA31.scaling, Llama3Scaling(32.0, 1.0, 4.0, 8192), Llama3Scaling(2, 3, 9, 64)])
@pytest.mark.parametrize("theta", [500.0, 500000.0])
def test_scaling_of_llama3_is_the_published_rule(scaling, theta):
    plain = plain_frequencies(theta, 128)
    found = rope.frequencies(RopeConfig(theta, scaling), 128)
    np.testing.assert_allclose(found, published_scaling(plain, scaling), rtol=2e-7)
    assert found[0] == 1 and not np.allclose(found, plain)


def test_divisors_divide_each_frequency():
    divisors = (1.0, 2.0, 4.0, 8.0)
    found = rope.frequencies(RopeConfig(10000.0, divisors), 8)
    np.testing.assert_allclose(found, plain_frequencies(10000.0, 8) / divisors, rtol=1e-7)


@pytest.mark.parametrize("config", [PLAIN, LLAMA31], ids=["plain", "llama3"])
def test_rotation_is_the_complex_product(config):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 9, 64)).astype(np.float32)
    positions = rng.integers(0, 4000, (2, 9))
    cos, sin = rope.angles(config, 64, jnp.asarray(positions, jnp.int32))
    assert cos.shape == sin.shape == (2, 9, 64) and cos.dtype == sin.dtype == jnp.float32
    frequencies = plain_frequencies(config.theta, 64)
    if config.scaling is not None:
        frequencies = published_scaling(frequencies, config.scaling)
    found = np.asarray(rope.rotate(jnp.asarray(x), cos, sin))
    np.testing.assert_allclose(found, rotated(x.astype(np.float64), positions, frequencies), atol=3e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_position_zero_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8))
    cos, sin = rope.angles(PLAIN, 8, jnp.zeros((1, 3), jnp.int32))
    np.testing.assert_array_equal(rope.rotate(x, cos, sin), x)


def test_only_the_distance_matters():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 64)).astype(np.float32)

    def score(query, key):
        turned = [
            rope.rotate(jnp.asarray(x), *rope.angles(PLAIN, 64, jnp.full((1, 1), at, jnp.int32)))
            for x, at in ((q, query), (k, key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3)
    assert score(7, 3) != pytest.approx(score(9, 3), abs=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_angles_stay_in_float32_at_every_dtype_and_far_positions(dtype):
    positions = 2**16 + np.arange(1, 300, 2)[None]
    cos, sin = rope.angles(LLAMA31, 128, jnp.asarray(positions, jnp.int32))
    frequencies = rope.frequencies(LLAMA31, 128).astype(np.float64)
    exact = np.exp(1j * positions[..., None] * frequencies)
    np.testing.assert_allclose(np.asarray(cos)[..., :64], exact.real, atol=6e-3)  # half an ulp of a float32 angle
    np.testing.assert_allclose(np.asarray(sin)[..., 64:], exact.imag, atol=6e-3)
    x = jnp.ones((1, 1, positions.size, 128), dtype)
    found = rope.rotate(x, cos, sin)
    assert found.dtype == dtype
    wanted = rotated(np.ones((1, 1, positions.size, 128)), positions, frequencies)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=2e-2)  # bfloat16 positions would be off by 2


def test_neighbours_stay_distinct_where_bfloat16_positions_would_not():
    cos, _ = rope.angles(PLAIN, 2, jnp.arange(2**17, 2**17 + 64)[None])
    assert len(np.unique(np.asarray(cos))) > 40
