"""Expected attention (arXiv 2510.00636): keep what queries still to come will attend to, judged by those seen."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastkv_jax.methods.base import Layer
from fastkv_jax.methods.budgets import check_int
from fastkv_jax.methods.compression import Compression
from fastkv_jax.model import rope


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Compression):
    """E[exp(q k / sqrt(D))] for Gaussian queries at the next `future` positions, times the norm of the value.

    Mean and covariance come from the prompt's queries before rotation, the first `sinks` left out; both are turned by
    the mean rotation of the positions to come. Needs no particular question.

    Source: section 3.2, equations 5 to 8; softmax over the prompt and group mean as in kvpress 0.5.4. Differs: the last
    `window_size` tokens stay.
    """

    sinks: int = 4
    future: int = 512

    def __post_init__(self):
        super().__post_init__()
        check_int("sinks", self.sinks, 0)
        check_int("future", self.future, 1)

    def importance(self, layer: Layer) -> Float[Array, "B N S"]:
        """Group mean of the expected attention, times |v|; sinks stay. One KV head at a time, for memory."""
        grouped = layer.q.reshape(*layer.k.shape[:2], -1, *layer.q.shape[2:])
        q, k, v = (jnp.moveaxis(a, 1, 0) for a in (grouped, layer.k, layer.v))
        expected = lax.map(lambda head: self._one_head(head[0], head[1], head[2], layer), (q, k, v))
        return jnp.where((layer.positions < self.sinks)[:, None], jnp.inf, jnp.moveaxis(expected, 0, 1))

    def _one_head(self, q, k, v, layer: Layer):
        """Of queries [B, G, S, D] to come, keys and values [B, S, D]: [B, S]."""
        mean, covariance = self._future_queries(q, layer)
        k, dim = k.astype(jnp.float32), k.shape[-1]
        logits = jnp.einsum("bsd,bgd->bgs", k, mean) / dim**0.5
        logits += (jnp.einsum("bsd,bgde->bgse", k, covariance) * k[:, None]).sum(axis=-1) / (2 * dim)
        expected = jax.nn.softmax(logits, axis=-1, where=(layer.positions >= 0)[:, None]).mean(axis=1)
        return expected * jnp.linalg.norm(v.astype(jnp.float32), axis=-1)

    def _future_queries(self, q, layer: Layer):
        """Mean [B, G, D] and covariance [B, G, D, D] of the queries to come."""
        q = rope.rotate(q.astype(jnp.float32), *_angles(layer, -layer.positions))  # as before rotation
        counted = (layer.positions >= self.sinks) | (layer.positions == layer.positions[:, -1:])  # at least one
        weight = counted.astype(jnp.float32)[:, None, :, None]
        weight = weight / weight.sum(axis=2, keepdims=True)
        mean = (q * weight).sum(axis=2)
        centred = (q - mean[:, :, None]) * jnp.sqrt(weight)
        covariance = jnp.einsum("bgsd,bgse->bgde", centred, centred)
        future = layer.positions[:, -1:] + 1 + jnp.arange(self.future)[None]  # [B, future]
        mean_angles = [a.mean(axis=1, keepdims=True) for a in _angles(layer, future)]
        half = rope.rotate(covariance, *mean_angles).swapaxes(-1, -2)
        return rope.rotate(mean[:, :, None], *mean_angles)[:, :, 0], rope.rotate(half, *mean_angles)


def _angles(layer: Layer, positions):
    """Cosine and sine [B, R, D] of positions [B, R]."""
    angles = positions[..., None].astype(jnp.float32) * jnp.tile(layer.frequencies, 2)[None, None]
    return jnp.cos(angles), jnp.sin(angles)
