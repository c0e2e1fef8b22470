"""How lm-evaluation-harness asks for an answer: its generation arguments, read before anything runs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastkv_jax.decoding.sampling import Greedy, Sample, Sampler
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.seeds import check_seed

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's own, and aliases
FILTERS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # with what switches them off
SAMPLING = ("temperature", *FILTERS)
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "length_penalty": 1, "use_cache": True}  # what we do anyway


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
    argument and its value for anything that would be ignored, unless greedy answers are asked for by name: then what
    only samples use may stand beside it.
    """
    found = check(given)
    lengths = {name: found[name] for name in LENGTHS if name in found}
    if len(set(lengths.values())) > 1:
        raise FastKVConfigError(f"gen_kwargs name different lengths: {lengths}")
    length = next(iter(lengths.values()), new_tokens)
    return Decoding(length, found.get("until", ()), _sampler(found), found.get("seed", 0))


def check(given: Mapping[str, Any]) -> dict[str, Any]:
    """Each argument by itself, as what it means; what it means beside others is not asked.

    Raises `FastKVConfigError` for one that is unknown or out of range.
    """
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in READERS:
            found[name] = READERS[name](name, value)
        elif name not in NEUTRAL or value != NEUTRAL[name]:
            raise FastKVConfigError(f"gen_kwargs {name}={value!r} is not supported; supported: {', '.join(READERS)}")
    return found


def _stops(name: str, until: Any) -> tuple[str, ...]:
    """The texts that end an answer; an empty one ends nothing."""
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str | None) for stop in stops):
        raise FastKVConfigError(f"gen_kwargs {name} must be a text or a list of texts, got {until!r}")
    return tuple(dict.fromkeys(stop for stop in stops if stop))


def _sampler(found: Mapping[str, Any]) -> Sampler:
    """Of arguments that are each in range."""
    samples = found.get("do_sample", found.get("temperature", 0.0) != 0)
    if samples and found.get("temperature") != 0:
        return Sample(**{name: found[name] for name in SAMPLING if name in found})
    inert = [name for name in FILTERS if found.get(name, FILTERS[name]) != FILTERS[name]]
    if inert and "do_sample" not in found and "temperature" not in found:
        raise FastKVConfigError(
            f"gen_kwargs {inert[0]}={found[inert[0]]} does nothing without do_sample=True or a temperature"
        )
    return Greedy()


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FastKVConfigError(f"gen_kwargs {name} must be true or false, got {value!r}")
    return value


def _share(name: str, value: Any) -> float:
    number = _number(name, value)
    alone: dict[str, Any] = {name: number}
    Sample(**alone)  # or it is refused
    return number


def _temperature(name: str, value: Any) -> float:
    return _share(name, value) if _number(name, value) else 0.0  # greedy


def _top_k(name: str, value: Any) -> int:
    return _integer(name, value, 0)


def _length(name: str, value: Any) -> int:
    return _integer(name, value, 1)


def _seed(name: str, value: Any) -> int:
    seed = _integer(name, value, 0)
    check_seed(seed)
    return seed


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise FastKVConfigError(f"gen_kwargs {name} must be a number, got {value!r}")
    return number


def _integer(name: str, value: Any, least: int) -> int:
    number = _number(name, value)
    if number != int(number) or number < least:
        raise FastKVConfigError(f"gen_kwargs {name} must be an integer >= {least}, got {value!r}")
    return int(number)


READERS: dict[str, Callable[[str, Any], Any]] = {
    "until": _stops,
    "do_sample": _truth,
    "seed": _seed,
    **dict.fromkeys(LENGTHS, _length),
    "temperature": _temperature,
    "top_p": _share,
    "top_k": _top_k,
    "min_p": _share,
}
