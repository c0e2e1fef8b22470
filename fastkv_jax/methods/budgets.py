"""How many of n: rates and counts, and the checks all settings share."""

from dataclasses import dataclass

import numpy as np

from fastkv_jax.errors import FastKVConfigError


@dataclass(frozen=True)
class Budget:
    """How many of n: a rate of the prompt or a count, one of them."""

    rate: float | None
    count: int | None

    def of(self, n: np.ndarray) -> np.ndarray:
        """int(n * rate) in double precision, or min(n, count)."""
        if self.rate is not None:
            return np.floor(n * self.rate).astype(np.int64)
        return n if self.count is None else np.minimum(n, self.count)


def at_least(window: int | np.ndarray, budget: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The budget, but never less than the window and never more than n."""
    return np.minimum(n, np.maximum(window, budget))


def check_pair(rate_name: str, rate: float | None, count_name: str, count: int | None) -> None:
    """Raise `FastKVConfigError` unless exactly one of a rate in (0, 1] and a count >= 1 is given."""
    if (rate is None) == (count is None):
        given = "neither is" if rate is None else f"{rate_name}={rate} and {count_name}={count} are both"
        raise FastKVConfigError(f"give one of {rate_name} and {count_name}; {given} set")
    if rate is not None:
        check_rate(rate_name, rate)
    if count is not None:
        check_int(count_name, count, 1)


def check_rate(name: str, value: float) -> None:
    """Raise `FastKVConfigError` unless the value is in (0, 1]."""
    if isinstance(value, str | bool) or not 0 < value <= 1:  # NaN fails too
        raise FastKVConfigError(f"{name} must be in (0, 1], got {value}")


def check_int(name: str, value: object, least: int) -> None:
    """Raise `FastKVConfigError` unless the value is an integer >= least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FastKVConfigError(f"{name} must be an integer >= {least}, got {value!r}")


def check_pooling(kernel_size: object, pooling: object) -> None:
    """Raise `FastKVConfigError` unless the kernel is odd and the pooling known."""
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool) or kernel_size < 1 or kernel_size % 2 == 0:
        raise FastKVConfigError(f"kernel_size must be an odd integer >= 1, got {kernel_size!r}")
    if pooling not in ("max", "avg"):
        raise FastKVConfigError(f"pooling must be 'max' or 'avg', got {pooling!r}")


def check_layer(name: str, layer: int, num_layers: int, last: int) -> None:
    """Raise `FastKVConfigError` unless the layer is one of 0..last of a model with `num_layers`."""
    if last < 0:
        raise FastKVConfigError(f"a {num_layers}-layer model has no layer to propagate to; use FullKV (full)")
    if layer > last:
        raise FastKVConfigError(f"{name} {layer} is outside 0…{last} for a {num_layers}-layer model")
