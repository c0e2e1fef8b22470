"""The tolerances forgive what a dtype rounds, and nothing more."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax.device_checks.tolerances import OF_DTYPE, apart

RANDOM = np.random.default_rng(0)
X, W = RANDOM.standard_normal((8, 256), np.float32), RANDOM.standard_normal((128, 256), np.float32)
EXACT = np.float64(X) @ np.float64(W).T


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """float32 with the last `bits` of its 23 dropped."""
    return (x.view(np.int32) & -(1 << bits)).view(np.float32)


def test_a_vector_s_errors_are_relative_to_its_largest_number():
    assert apart([[1.0, 100.0], [0.01, 0.0]], [[1.0, 101.0], [0.02, 0.0]]) == pytest.approx(0.5)
    assert apart(np.zeros((2, 3)), np.zeros((2, 3))) == 0
    assert apart([[np.nan, 1.0]], [[1.0, 1.0]]) == apart([[np.inf, 1.0]], [[1.0, 1.0]]) == float("inf")
    with pytest.raises(ValueError, match="shapes differ"):
        apart(np.zeros((2, 3)), np.zeros(3))


def test_float32_passes_and_tf32_does_not():
    assert apart(X @ W.T, EXACT) < OF_DTYPE["float32"] / 10
    assert apart(rounded(X, 13) @ rounded(W, 13).T, EXACT) > 2 * OF_DTYPE["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_pass_rounded_once_and_not_with_two_bits_less(dtype: str):
    once = EXACT.astype(jnp.dtype(dtype))
    assert apart(once, EXACT) < OF_DTYPE[dtype] / 2
    fewer = rounded(EXACT.astype(np.float32), 23 - jnp.finfo(dtype).nmant + 4)
    assert apart(fewer, EXACT) > OF_DTYPE[dtype]
