"""Keys and values in 8 bits, with a scale per token and head."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def quantize(x: Float[Array, "*S D"], dtype) -> tuple[Shaped[Array, "*S D"], Float[Array, "*S"]]:
    """Symmetric, the largest magnitude of each vector on the largest number of `dtype` (int8 or float8_e4m3fn).

    x is about values * scale; a vector of zeros has scale 0. The scale is in bfloat16, rounded up, and the values are
    made with that rounded scale: two bytes are saved at the cost of the last half percent of the range.
    """
    dtype = jnp.dtype(dtype)
    integers = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integers else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = (jnp.abs(x).max(axis=-1) * ((1 + 2.0**-8) / largest)).astype(jnp.bfloat16)
    values = x / jnp.where(scale > 0, scale, 1.0).astype(jnp.float32)[..., None]
    values = jnp.round(values) if integers else values
    return values.clip(-largest, largest).astype(dtype), scale  # clipped: a scale so small that it lost bits
