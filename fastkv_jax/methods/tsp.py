"""Token-selective propagation as settings: after which layers how many tokens go on, with any compression beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods.base import Segment
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
    layers = (tsp_layer,) if tsp_layers is None else tuple(tsp_layers)
    for layer in layers:
        check_int("tsp_layer" if tsp_layers is None else "each of tsp_layers", layer, 0)
    if not layers or list(layers) != sorted(set(layers)):
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
