"""The method's flags: one for each field of the methods' dataclasses, on top of a preset."""

import argparse
import dataclasses
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

from fastkv_jax.methods import METHODS, Method, presets

_HELP = {
    "tsp_layer": "layer after which only the most attended tokens go on, 0 ... layers - 2",
    "tsp_rate": "share of the prompt that goes on, in (0, 1]",
    "tsp_length": "tokens that go on, >= window size; instead of --tsp-rate",
    "retention_rate": "share of the prompt each KV head keeps, in (0, 1]",
    "capacity": "entries each KV head keeps, >= window size; instead of --retention-rate",
    "window_size": "queries at the end of the question that judge, >= 1",
    "kernel_size": "neighbours pooled into a score, odd, >= 1",
    "pooling": "how they are pooled",
    "min_prompt_to_compress": "shorter prompts stay whole, >= 0 tokens",
    "tsp_layers": "several TSP layers, rising: 10,15,20; --tsp-rate is then one share for each, or the last one's",
    "compression": "the method that keeps entries instead of fastkv's own, with the budget given",
    "selection": "the method that chooses the tokens instead of fastkv's own",
    "sinks": "first tokens that always stay, >= 0 (streamingllm, pyramidinfer, expectedattention)",
    "filter_layer": "layer that chooses the tokens (gemfilter)",
    "recent_ratio": "share of the prompt that judges and stays, in (0, 1] (pyramidinfer)",
    "decay_ratio": "share of the tokens that goes on after the last layer, in (0, 1] (pyramidinfer)",
    "distance_weight": "weight of the last query against the first recent one (pyramidinfer)",
    "min_context": "no cut to so few tokens, >= 0 (pyramidinfer)",
    "score_layers": "layers that decide together, >= 1 (claa, asl)",
    "full_layers": "first layers that keep everything, >= 0 (claa)",
    "min_layer": "first layer after which tokens may be dropped (asl; default: a third)",
    "threshold": "share of the first variance below which they are dropped, in (0, 1] (asl)",
    "beta": "steepness of the pyramid, >= 1 (pyramidkv)",
    "future": "positions to come that are averaged over, >= 1 (expectedattention)",
}


SHOWN_CHOICES = 4  # longer lists are in the help text of --method


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """--method, --preset, and one flag per setting of any method."""
    group = parser.add_argument_group("compression (settings not given come from the preset)")
    group.add_argument("--method", choices=tuple(METHODS), default="fastkv", help="default: fastkv")
    group.add_argument(
        "--preset", metavar="NAME", help=f"{', '.join(presets.names())} (default: the model's own, else default)"
    )
    for name, kind in _settings().items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        if name in presets.PARTS:
            choices = [other for other in METHODS if other not in ("full", "fastkv")]
        scalar = str if choices else next((t for t in _alternatives(kind) if t in (int, float)), float)
        metavar = None if choices else "N" if scalar is int else "R"
        several = any(typing.get_origin(t) is tuple for t in _alternatives(kind))
        if choices and len(choices) > SHOWN_CHOICES:
            metavar = "METHOD"
        parse = _one_or_several(scalar, always=name == "tsp_layers") if several else scalar
        group.add_argument(
            f"--{name.replace('_', '-')}", type=parse, choices=choices, metavar=metavar, help=_HELP[name]
        )


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself; a tuple of numbers counts as the number too."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    parts: tuple[Any, ...] = typing.get_args(kind) if union else (kind,)
    return (*parts, *(t for part in parts if typing.get_origin(part) is tuple for t in typing.get_args(part)))


def _one_or_several(scalar: type, *, always: bool) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        values = [scalar(part) for part in text.split(",")]
        return tuple(values) if always or len(values) > 1 else values[0]

    parse.__name__ = scalar.__name__  # argparse names it in its error
    return parse


def check(options: argparse.Namespace) -> None:
    """Raise `FastKVConfigError` for settings that cannot work with any model."""
    preset = presets.load(options.preset) if options.preset else presets.for_model(options.model)
    with warnings.catch_warnings(action="ignore"):  # `method` repeats them
        presets.build(options.method, preset, given(options), num_layers=None)


def method(options: argparse.Namespace, model: str, num_layers: int) -> tuple[presets.Preset, Method]:
    """The preset in use and the method it makes with the flags given."""
    preset = presets.load(options.preset) if options.preset else presets.for_model(model)
    return preset, presets.build(options.method, preset, given(options), num_layers)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags have set."""
    return {name: getattr(options, name) for name in _settings() if getattr(options, name) is not None}


def _settings() -> dict[str, Any]:
    """Every method's fields and their types."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        for field in dataclasses.fields(method):
            if field.name in presets.settings_of(name):
                found.setdefault(field.name, field.type)  # FastKV's come first, and allow the most
    return found
