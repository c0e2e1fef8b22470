"""How lm-evaluation-harness asks for an answer: its generation arguments, read before anything runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.sampling import Greedy, Sample, Sampler

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's own, and aliases
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "length_penalty": 1, "use_cache": True}  # what we do anyway
KNOWN = ("until", "do_sample", "seed", *LENGTHS, *SAMPLING)


@dataclass(frozen=True)
class Decoding:
    """How one answer is decoded."""

    new_tokens: int
    stops: tuple[str, ...]
    sampler: Sampler
    seed: int


def read(given: Mapping[str, Any], new_tokens: int) -> Decoding:
    """From a request's arguments; `new_tokens` where they name no length.

    A temperature above 0 samples unless `do_sample` is false, as in the harness. Raises `FastKVConfigError` naming the
    argument and its value for anything that would be ignored.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in KNOWN and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise FastKVConfigError(f"gen_kwargs {name}={value!r} is not supported; supported: {', '.join(KNOWN)}")
    lengths = {name: _integer(name, given[name], 1) for name in LENGTHS if name in given}
    if len(set(lengths.values())) > 1:
        raise FastKVConfigError(f"gen_kwargs name different lengths: {lengths}")
    return Decoding(
        next(iter(lengths.values()), new_tokens), _stops(given.get("until", ())), _sampler(given),
        _integer("seed", given.get("seed", 0), 0),
    )  # fmt: skip


def _stops(until: Any) -> tuple[str, ...]:
    """The texts that end an answer; an empty one ends nothing."""
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str | None) for stop in stops):
        raise FastKVConfigError(f"gen_kwargs until must be a text or a list of texts, got {until!r}")
    return tuple(dict.fromkeys(stop for stop in stops if stop))


def _sampler(given: Mapping[str, Any]) -> Sampler:
    samples = given.get("do_sample", given.get("temperature", 0.0) != 0)
    if not isinstance(samples, bool):
        raise FastKVConfigError(f"gen_kwargs do_sample must be true or false, got {samples!r}")
    numbers = {name: _number(name, given[name]) for name in SAMPLING if name in given}
    if not samples or numbers.get("temperature") == 0:
        return Greedy()
    return Sample(**{**numbers, "top_k": _integer("top_k", given.get("top_k", 0), 0)})


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise FastKVConfigError(f"gen_kwargs {name} must be a number, got {value!r}")
    return number


def _integer(name: str, value: Any, least: int) -> int:
    number = _number(name, value)
    if number != int(number) or number < least:
        raise FastKVConfigError(f"gen_kwargs {name} must be an integer >= {least}, got {value!r}")
    return int(number)
