"""Rotary position embedding: angles from positions, and the rotation. Angles stay in float32 at every model dtype."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastkv_jax.model.config import Llama3Scaling, RopeConfig
from kernels_pallas import arithmetic


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each rotary pair, [D/2] float32.

    Source: RoFormer (arXiv 2104.09864) section 3.2.2; the scaling rule of Llama 3.1 as in its release notes.
    """
    freq = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.scaling:
        case None:
            pass
        case Llama3Scaling() as s:
            wavelength = 2 * math.pi / freq
            # 0 where at most low_freq_factor waves fit into the original context, 1 from high_freq_factor waves on.
            waves = s.original_max_position_embeddings / wavelength
            keep = np.clip((waves - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
            freq = (1 - keep) * freq / s.factor + keep * freq
        case divisors:
            freq = freq / np.asarray(divisors, dtype=np.float64)
    return freq.astype(np.float32)


def angles(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "*B T"]
) -> tuple[Float[Array, "*B T D"], Float[Array, "*B T D"]]:
    """Cosine and sine of every position, each half repeated, float32."""
    theta = jnp.multiply.outer(positions.astype(jnp.float32), frequencies(rope, head_dim))
    theta = jnp.concatenate([theta, theta], axis=-1)
    return jnp.cos(theta), jnp.sin(theta)


def rotate(
    x: Float[Array, "B N T D"], cos: Float[Array, "B _ D"], sin: Float[Array, "B _ D"]
) -> Float[Array, "B N T D"]:
    """Rotate each pair (d, d + D/2) of `x` by its row's angle, or the one of all; in float32, returned in x's dtype."""
    return arithmetic.rotate(x, cos[:, None], sin[:, None])
