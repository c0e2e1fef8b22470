"""What several kernels compute alike."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def product(a: jax.Array, b: jax.Array, contracted: int, batched: int = 0) -> jax.Array:
    """a [..., R, X] with b over X and b's axis `contracted`, the first `batched` axes in step; in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    both = tuple(range(batched))
    dims = (((a.ndim - 1,), (contracted,)), (both, both))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def rms_norm(x: Float[Array, "*S E"], weight: Float[Array, " E"], eps: float) -> Float[Array, "*S E"]:
    """Root-mean-square norm, computed in float32. Source: arXiv 1910.07467, eq. 4."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return jnp.broadcast_to(weight, x.shape) * (x32 * scale).astype(x.dtype)


def rotate(x: Float[Array, "*S D"], cos: Float[Array, "*#S D"], sin: Float[Array, "*#S D"]) -> Float[Array, "*S D"]:
    """Rotate each pair (d, d + D/2) of `x` by its row's angle; in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * cos + turned * sin).astype(x.dtype)


def round_up(x: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-x // to) * to
