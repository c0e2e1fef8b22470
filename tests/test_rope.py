"""Rotary angles against float64, and the frequency rule of Llama 3.1 against a transcription of its definition."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax import rope
from fastkv_jax.config import Llama3Scaling, RopeConfig


def test_frequencies_fall_geometrically():
    assert np.allclose(rope.frequencies(RopeConfig(1e4, None), 8), [1e4 ** (-i / 4) for i in range(4)])


def test_llama3_scaling_keeps_short_waves_stretches_long_ones_and_ramps_between():
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    scaled, plain = (rope.frequencies(RopeConfig(5e5, s), 128) for s in (scaling, None))
    for ours, base in zip(scaled, plain.astype(np.float64), strict=True):
        wavelength = 2 * math.pi / base
        if wavelength < 8192 / 4:
            expected = base
        elif wavelength > 8192:
            expected = base / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * base / 8 + smooth * base
        assert ours == pytest.approx(expected, rel=1e-6)


def test_divisors_divide_each_frequency():
    divided = rope.frequencies(RopeConfig(1e4, (1.0, 2.0, 4.0, 8.0)), 8)
    assert np.allclose(divided * [1, 2, 4, 8], rope.frequencies(RopeConfig(1e4, None), 8))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_rotation_turns_each_pair_by_position_times_frequency(dtype):
    positions = jnp.array([[0, 1, 257, 100_003]])  # bfloat16 could not even count them
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 4, 8)), dtype)
    config = RopeConfig(1e4, None)
    out = rope.rotate(x, *rope.angles(config, 8, positions))
    assert out.dtype == dtype
    angle = np.asarray(positions)[0][:, None] * rope.frequencies(config, 8).astype(np.float32)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    expected = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )
    assert np.allclose(np.asarray(out, np.float64), expected, atol=2e-2 if dtype == jnp.bfloat16 else 1e-3)
