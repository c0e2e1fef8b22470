"""The method's flags: one for each field of the methods' dataclasses, on top of a preset.

They stand here once more, checked by a test: to read them off the classes would cost a help text the import of JAX.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastkv_jax.methods import NAMES, presets

if TYPE_CHECKING:
    from fastkv_jax.methods.base import Method

_PARTS = tuple(name for name in NAMES if name not in ("full", "fastkv"))
Kind = type[int] | type[float] | tuple[str, ...]  # of a value, or those it may have

_SETTINGS: dict[str, tuple[Kind, str]] = {
    "retention_rate": (float, "share of the prompt each KV head keeps, in (0, 1]"),
    "capacity": (int, "entries each KV head keeps, >= window size; instead of --retention-rate"),
    "window_size": (int, "queries at the end of the question that judge, >= 1"),
    "min_prompt_to_compress": (int, "shorter prompts stay whole, >= 0 tokens"),
    "kernel_size": (int, "neighbours pooled into a score, odd, >= 1"),
    "pooling": (("max", "avg"), "how they are pooled"),
    "tsp_layer": (int, "layer after which only the most attended tokens go on, 0 ... layers - 2"),
    "tsp_rate": (float, "share of the prompt that goes on, in (0, 1]"),
    "tsp_length": (int, "tokens that go on, >= window size; instead of --tsp-rate"),
    "tsp_layers": (
        int,
        "several TSP layers, rising: 10,15,20; --tsp-rate is then one share for each, or the last one's",
    ),
    "compression": (_PARTS, "the method that keeps entries instead of fastkv's own, with the budget given"),
    "selection": (_PARTS, "the method that chooses the tokens instead of fastkv's own"),
    "sinks": (int, "first tokens that always stay, >= 0 (streamingllm, pyramidinfer, expectedattention)"),
    "filter_layer": (int, "layer that chooses the tokens (gemfilter)"),
    "recent_ratio": (float, "share of the prompt that judges and stays, in (0, 1] (pyramidinfer)"),
    "decay_ratio": (float, "share of the tokens that goes on after the last layer, in (0, 1] (pyramidinfer)"),
    "distance_weight": (float, "weight of the last query against the first recent one (pyramidinfer)"),
    "min_context": (int, "no cut to so few tokens, >= 0 (pyramidinfer)"),
    "beta": (int, "steepness of the pyramid, >= 1 (pyramidkv)"),
    "score_layers": (int, "layers that decide together, >= 1 (claa, asl)"),
    "full_layers": (int, "first layers that keep everything, >= 0 (claa)"),
    "min_layer": (int, "first layer after which tokens may be dropped (asl; default: a third)"),
    "threshold": (float, "share of the first variance below which they are dropped, in (0, 1] (asl)"),
    "future": (int, "positions to come that are averaged over, >= 1 (expectedattention)"),
}
_SEVERAL = ("tsp_rate", "tsp_length", "tsp_layers")  # may be several numbers, the last one always
SHOWN_CHOICES = 4  # longer lists are in the help text of --method


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """--method, --preset, and one flag per setting of any method."""
    group = parser.add_argument_group("compression (settings not given come from the preset)")
    group.add_argument("--method", choices=NAMES, default="fastkv", help="default: fastkv")
    group.add_argument(
        "--preset", metavar="NAME", help=f"{', '.join(presets.names())} (default: the model's own, else default)"
    )
    for name, (kind, text) in _SETTINGS.items():
        choices = kind if isinstance(kind, tuple) else None
        scalar = str if isinstance(kind, tuple) else kind
        metavar = None if choices else "N" if scalar is int else "R"
        if choices and len(choices) > SHOWN_CHOICES:
            metavar = "METHOD"
        parse = _one_or_several(scalar, always=name == _SEVERAL[-1]) if name in _SEVERAL else scalar
        group.add_argument(f"--{name.replace('_', '-')}", type=parse, choices=choices, metavar=metavar, help=text)


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


def method(options: argparse.Namespace, model: str, num_layers: int) -> "tuple[presets.Preset, Method]":
    """The preset in use and the method it makes with the flags given."""
    preset = presets.load(options.preset) if options.preset else presets.for_model(model)
    return preset, presets.build(options.method, preset, given(options), num_layers)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags have set."""
    return {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
