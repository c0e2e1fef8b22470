"""What several kernels compute alike."""

import jax
import jax.numpy as jnp
from jax import lax


def product(a: jax.Array, b: jax.Array, contracted: int, batched: int = 0) -> jax.Array:
    """a [..., R, X] with b over X and b's axis `contracted`, the first `batched` axes in step; in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    both = tuple(range(batched))
    dims = (((a.ndim - 1,), (contracted,)), (both, both))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def round_up(x: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-x // to) * to
