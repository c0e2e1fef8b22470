"""Which suites and methods an evaluation runs: those of its flags, or a grid of both from a file."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from fastkv_jax.cli.flags import settings
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods import presets

if TYPE_CHECKING:
    from fastkv_jax.evals.suites.catalogue import SuiteSettings
    from fastkv_jax.methods.base import Method

RUN_KEYS = {"name": str, "method": str, "preset": str, "settings": dict}


class Run(NamedTuple):
    """One method with its settings."""

    name: str
    method: "Method"
    window_at_question: bool


def read(options: argparse.Namespace) -> dict[str, Any] | None:
    """The content of a grid's file; None for a suite by name."""
    from fastkv_jax.evals.suites import grids
    from fastkv_jax.evals.suites.catalogue import USES

    if options.suite in USES:
        return None
    try:
        if options.suite.endswith(".yaml"):
            found = yaml.safe_load(Path(options.suite).read_text(encoding="utf-8"))
        else:
            found = grids.load(options.suite)
    except FileNotFoundError as error:
        raise FastKVConfigError(f"unknown suite {options.suite!r}; there are: {', '.join(USES)}, evidence, or a .yaml "
                                "file") from error  # fmt: skip
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FastKVConfigError(f"{options.suite} is no YAML: {' '.join(str(error).split())[:200]}") from error
    lists = [found.get(part) for part in ("suites", "runs")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, list) and part for part in lists):
        raise FastKVConfigError(f"{options.suite} needs the lists 'suites' and 'runs'")
    strange = found.keys() - {"about", "share_prefill", "suites", "runs"}
    if strange:
        raise FastKVConfigError(f"{options.suite}: unknown key {sorted(strange)[0]!r}")
    given = [name for name in ("tasks", "lengths", "samples", "depths", "data", "texts", "protocol")
             if getattr(options, name) not in (None, [])]  # fmt: skip
    if found.get("share_prefill") and options.query_agnostic:
        raise FastKVConfigError(f"{options.suite} shares prefills: not with --query-agnostic")
    given += ["preset"] * (options.preset is not None) + [name.replace("_", "-") for name in settings.given(options)]
    if given:
        raise FastKVConfigError(f"--{given[0]} belongs to one suite and method; {options.suite} has its own settings")
    return found


def suite_settings(entry: dict[str, Any]) -> "SuiteSettings":
    """A suite of a grid, or `FastKVConfigError`."""
    from fastkv_jax.evals.suites.catalogue import SuiteSettings

    known = {field.name for field in dataclasses.fields(SuiteSettings)}
    if not isinstance(entry, dict) or "suite" not in entry or entry.keys() - known:
        raise FastKVConfigError(f"a suite has the settings {', '.join(sorted(known))}, got {entry!r}")
    return SuiteSettings(**_no_lists(entry))


def runs(options: argparse.Namespace, grid: dict[str, Any] | None, model: str, layers: int) -> list[Run]:
    """The methods to run: those of the grid, or the one of the flags."""
    if grid is None:
        preset, method = settings.method(options, model, layers)
        return [Run(options.method, method, preset.window_end == "question")]
    found = []
    for entry in grid["runs"]:
        if (
            not isinstance(entry, dict)
            or not {"name", "method"} <= entry.keys() <= RUN_KEYS.keys()
            or not all(isinstance(value, RUN_KEYS[key]) for key, value in entry.items())
        ):
            raise FastKVConfigError(f"a run has name, method, preset, which are texts, and settings, got {entry!r}")
        preset = presets.load(entry["preset"]) if "preset" in entry else presets.for_model(model)
        method = presets.build(entry["method"], preset, _no_lists(entry.get("settings", {})), layers)
        found.append(Run(entry["name"], method, preset.window_end == "question"))
    folders = [slug(one.name) for one in found]
    for name in folders:
        if not name or folders.count(name) > 1:
            raise FastKVConfigError(f"each run needs a name that makes a folder of its own; {name!r} does not")
    return found


def _no_lists(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def together(runs: Sequence[Run], num_layers: int, share: bool) -> list[list[Run]]:
    """The runs, those together that one prefill can serve."""
    from fastkv_jax.prefilling.many_methods import in_one_pass

    alone: list[list[Run]] = []
    shared: dict[bool, list[Run]] = {}  # by where the window ends
    for one in runs:
        if share and in_one_pass(one.method, num_layers):
            shared.setdefault(one.window_at_question, []).append(one)
        else:
            alone.append([one])
    return [*shared.values(), *alone]


def slug(name: str) -> str:
    """A run's name as the name of its folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()
