"""The method's flags: one for each field of the methods' dataclasses, on top of a preset."""

import argparse
import dataclasses
import typing
import warnings
from typing import Any

from fastkv_jax import presets
from fastkv_jax.methods import METHODS, Method

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
}


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """--method, --preset, and one flag per setting of any method."""
    group = parser.add_argument_group("compression (settings not given come from the preset)")
    group.add_argument("--method", choices=tuple(METHODS), default="fastkv", help="default: fastkv")
    group.add_argument(
        "--preset", metavar="NAME", help=f"{', '.join(presets.names())} (default: the model's own, else default)"
    )
    for name, kind in _settings().items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        scalar = str if choices else next(t for t in (*typing.get_args(kind), kind) if t is not type(None))
        metavar = None if choices else "N" if scalar is int else "R"
        group.add_argument(
            f"--{name.replace('_', '-')}", type=scalar, choices=choices, metavar=metavar, help=_HELP[name]
        )


def check(options: argparse.Namespace) -> None:
    """Raise `FastKVConfigError` for settings that cannot work with any model."""
    preset = presets.load(options.preset) if options.preset else presets.for_model(options.model)
    with warnings.catch_warnings(action="ignore"):  # `method` repeats them
        presets.build(options.method, preset, _given(options), num_layers=None)


def method(options: argparse.Namespace, model: str, num_layers: int) -> tuple[presets.Preset, Method]:
    """The preset in use and the method it makes with the flags given."""
    preset = presets.load(options.preset) if options.preset else presets.for_model(model)
    return preset, presets.build(options.method, preset, _given(options), num_layers)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _settings() if getattr(options, name) is not None}


def _settings() -> dict[str, Any]:
    """Every method's fields and their types."""
    return {
        field.name: field.type
        for name, method in METHODS.items()
        for field in dataclasses.fields(method)
        if field.name in presets.settings_of(name)
    }
