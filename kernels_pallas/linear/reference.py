"""The specification of products with a layer's matrices in plain jax.numpy."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.arithmetic import rms_norm


def linear(x, weight, layer, bias, residual):
    total = _product(x, weight, layer)
    total = total if bias is None else total + of_layer(bias, layer).astype(jnp.float32)[None]
    total = total if residual is None else total + residual.astype(jnp.float32)
    return total.astype(x.dtype)


def projections(x, norm, weights, layer, biases):
    x = rms_norm(x, of_layer(norm.weight, layer), norm.eps)
    return tuple(linear(x, weight, layer, bias, None) for weight, bias in zip(weights, biases, strict=True))


def gated(x, norm, gate, up, layer):
    y = rms_norm(x, of_layer(norm.weight, layer), norm.eps)
    return (jax.nn.silu(_product(y, gate, layer)) * _product(y, up, layer)).astype(x.dtype)


def of_layer(stack, layer):
    return lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _product(x, weight, layer):
    return jnp.einsum("bi,oi->bo", x, of_layer(weight, layer), preferred_element_type=jnp.float32)
