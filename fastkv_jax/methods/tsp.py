"""Token-selective propagation as settings: after which layers how many tokens go on, with any compression beside it."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import Method, Segment
from fastkv_jax.methods.budgets import Budget, at_least, check_int, check_pair

Rates = float | tuple[float, ...] | None
Counts = int | tuple[int, ...] | None


class Boundary(NamedTuple):
    """After `layer`, `budget` of the prompt's tokens go on."""

    layer: int
    budget: Budget


def boundaries(
    tsp_layer: int | None, tsp_layers: tuple[int, ...] | None, tsp_rate: Rates, tsp_length: Counts
) -> tuple[Boundary, ...]:
    """The settings as a list, or `FastKVConfigError`. One number for several layers is what the last one lets through.

    A single rate falls to its value by the same factor at each layer; a single length is the same for all.
    """
    if (tsp_layer is None) == (tsp_layers is None):
        given = "neither is" if tsp_layer is None else f"tsp_layer={tsp_layer} and tsp_layers={tsp_layers} are both"
        raise FastKVConfigError(f"give one of tsp_layer and tsp_layers; {given} set")
    layers = [tsp_layer] if tsp_layer is not None else list(tsp_layers or ())
    for layer in layers:
        check_int("tsp_layer" if tsp_layers is None else "each of tsp_layers", layer, 0)
    if not layers or layers != sorted(set(layers)):
        raise FastKVConfigError(f"tsp_layers must rise, got {tsp_layers}")
    if (tsp_rate is None) == (tsp_length is None):
        check_pair("tsp_rate", tsp_rate, "tsp_length", tsp_length)  # type: ignore[arg-type] - says which is missing
    count = len(layers)
    rates = _falling("tsp_rate", tsp_rate, count, lambda rate, i: rate ** ((i + 1) / count) if count > 1 else rate)
    lengths = _falling("tsp_length", tsp_length, count, lambda length, i: length)
    for rate, length in zip(rates, lengths, strict=True):
        check_pair("tsp_rate", rate, "tsp_length", length)
    return tuple(Boundary(*one) for one in zip(layers, map(Budget, rates, lengths), strict=True))


def _falling(name, given, count, spread):
    if not isinstance(given, tuple):
        usable = isinstance(given, int | float) and given > 0  # others are refused by the caller, as they are
        return [spread(given, i) if usable else given for i in range(count)]
    if len(given) != count:
        raise FastKVConfigError(f"{name} has {len(given)} values for {count} layers")
    if list(given) != sorted(given, reverse=True):
        raise FastKVConfigError(f"{name} must not rise, got {given}")
    return list(given)


def check_rows(
    stages: Sequence[Boundary], window: int, retention: float | None, capacity: int | None, published: bool
) -> None:
    """The rows that go on must hold the window and, unless published so, the budget of the cache."""
    for layer, (rate, length) in ((stage.layer, (stage.budget.rate, stage.budget.count)) for stage in stages):
        if length is not None and length < window:
            raise FastKVConfigError(f"window_size ({window}) must not exceed tsp_length ({length})")
        if published:
            continue
        if length is not None and capacity is not None and length < capacity:
            raise FastKVConfigError(
                f"tsp_length ({length}) < capacity ({capacity}): later layers cannot hold the budget"
            )
        if rate is not None and retention is not None and retention > rate:
            warnings.warn(
                f"retention_rate ({retention}) > tsp_rate ({rate}): layers after {layer} keep {rate} of the prompt",
                stacklevel=4,
            )


def check_parts(compression: Method | None, selection: Method | None, num_layers: int) -> None:
    """Both must fit the model. A compression keeps entries of the rows it is given; it must not drop rows itself."""
    for part in (compression, selection):
        if part is not None:
            part.check(num_layers)
    many = np.array([1 << 20])
    if compression and any(run.tokens < many for run in compression.plan(many, num_layers)):
        raise FastKVConfigError(f"{type(compression).__name__} drops tokens itself; it is no compression")


def compose(
    begin: int, end: int, tokens: np.ndarray, compression: Sequence[Segment], window: np.ndarray
) -> list[Segment]:
    """The layers [begin, end) that `tokens` rows enter, cut where the budgets of the compression change."""
    return [
        segment._replace(first=first, stop=stop, tokens=tokens, kept=at_least(window, segment.kept, tokens))
        for segment in compression
        for first, stop in [(max(begin, segment.first), min(end, segment.stop))]
        if first < stop or begin == end == segment.stop  # the published code may propagate after the last layer
    ]
