"""The seeds that can be given: those that JAX's keys, which hold 32 bits, tell apart."""

from fastkv_jax.errors import FastKVConfigError


def check_seed(seed: int) -> None:
    """Raise `FastKVConfigError` for a seed that equals another one, or that nothing can be made of."""
    if not 0 <= seed < 2**32:
        raise FastKVConfigError(f"seed must be in 0 ... 2**32 - 1, got {seed}")
