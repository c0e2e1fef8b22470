"""8-bit keys and values: near, symmetric, and quiet about zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kernels_pallas import quantize

# The largest rounding error, as a share of the vector's largest magnitude: half a step of int8, or half a unit in the
# last of 3 mantissa bits of the number itself and half the smallest subnormal, 2^-10 of 448. A bfloat16 scale that is
# rounded up makes both up to 2^-7 larger.
STEP = {jnp.int8: lambda x, most: most / 127 / 2, jnp.float8_e4m3fn: lambda x, most: x / 16 + most / 448 / 1024}
vectors = arrays(np.float32, (3, 8), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))


@pytest.mark.parametrize("dtype", list(STEP))
@given(x=vectors)
@settings(max_examples=50, deadline=None)
def test_values_times_scale_are_near(dtype, x: np.ndarray):
    values, scale = jax.jit(quantize, static_argnums=1)(x, dtype)
    assert values.dtype == dtype and values.shape == x.shape and scale.dtype == jnp.bfloat16 and scale.shape == (3,)
    most = np.abs(x).max(axis=-1, keepdims=True)
    restored = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[:, None]
    assert (np.abs(restored - x) <= STEP[dtype](np.abs(x), most) * (1.001 + 2**-7) + 1e-37).all()


@pytest.mark.parametrize("dtype", list(STEP))
def test_zeros_have_scale_0_and_bfloat16_is_taken(dtype):
    values, scale = quantize(jnp.zeros((2, 4), jnp.bfloat16), dtype)
    assert not np.asarray(values, np.float32).any() and not np.asarray(scale).any()
    values, scale = quantize(jnp.array([-3.0, 3.0, 0.0], jnp.bfloat16), dtype)
    restored = np.asarray(values, np.float32) * np.asarray(scale, np.float32)
    np.testing.assert_allclose(restored, [-3, 3, 0], rtol=0, atol=STEP[dtype](3, 3) * 1.01)
