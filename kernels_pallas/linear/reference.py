"""The specification of `linear` in plain jax.numpy."""

import jax.numpy as jnp
from jax import lax


def linear(x, weight, layer):
    mine = lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    return jnp.einsum("bi,oi->bo", x, mine, preferred_element_type=jnp.float32).astype(x.dtype)
