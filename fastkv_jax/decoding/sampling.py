"""From logits to the next token. A sampler is a frozen value: a static argument of the decode loop."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fastkv_jax.errors import FastKVConfigError


@runtime_checkable
class Sampler(Protocol):
    """Chooses one token per row."""

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""]) -> Int[Array, " B"]: ...


@dataclass(frozen=True)
class Greedy:
    """The most likely token, the lowest id on ties."""

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""]) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Sample:
    """Random tokens at a temperature, after the filters.

    Filters work on the distribution at this temperature, in the order top-k, top-p, min-p; the likeliest token always
    passes.

    Attributes:
        temperature: what logits are divided by, > 0 (default: 1)
        top_p: the likeliest tokens that have this mass together, in (0, 1] (default: 1, off)
        top_k: so many of the likeliest, >= 0 (default: 0, off)
        min_p: tokens at least so likely as a share of the likeliest, in [0, 1] (default: 0, off)

    Raises:
        FastKVConfigError: for a value outside its range
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise FastKVConfigError(f"temperature must be finite and > 0 to sample, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise FastKVConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise FastKVConfigError(f"top_k must be >= 0 (0 = off), got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise FastKVConfigError(f"min_p must be in [0, 1], got {self.min_p}")

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""]) -> Int[Array, " B"]:
        logits = (logits - logits.max(axis=-1, keepdims=True)) / max(self.temperature, 1e-30)  # no overflow
        if self.top_k or self.top_p < 1:
            logits = jnp.where(logits >= self._least(logits), logits, -jnp.inf)
        if self.min_p > 0:
            best = logits.max(axis=-1, keepdims=True)
            logits = jnp.where(logits >= best + math.log(self.min_p), logits, -jnp.inf)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)

    def _least(self, logits: Float[Array, "B V"]) -> Float[Array, "B 1"]:
        """The smallest logit that top-k and top-p let through."""
        falling = -jnp.sort(-logits, axis=-1)
        if self.top_k:
            rank = jnp.arange(falling.shape[-1])
            falling = jnp.where(rank < self.top_k, falling, -jnp.inf)
        mass = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
        before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
        passes = (before < self.top_p) & (falling > -jnp.inf)  # the token that crosses top_p still passes
        return jnp.min(jnp.where(passes, falling, jnp.inf), axis=-1, keepdims=True)
