"""Settings by name: what configs/ says about a model or a protocol, and how a caller's own settings replace them."""

import dataclasses
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods import NAMES

if TYPE_CHECKING:
    from fastkv_jax.methods.base import Method

_PAIRS = [("tsp_rate", "tsp_length"), ("retention_rate", "capacity"), ("tsp_layer", "tsp_layers")]
PARTNERS = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}
PARTS = ("compression", "selection")  # settings that name another method
HIDDEN = ("published", "base")  # for Python alone
_FOLDERS = ("models", "methods")


@dataclass(frozen=True)
class Preset:
    """Named settings. `window_end` says whether the observation window ends at the question or with the prompt."""

    name: str
    window_end: Literal["question", "prompt"]
    settings: Mapping[str, Any]  # fields of methods' dataclasses; a tsp_layer of None means layers/2 - 1

    def describe(self, method: str, built: "Method") -> str:
        """One line for people: the settings in force."""
        own = sorted(settings(built).items(), key=lambda item: not item[0].startswith("tsp"))  # the telling ones first
        given = " ".join(f"{name}={value}" for name, value in own if value is not None and value is not False)
        return f"{self.name}: {method} {given}".rstrip() + f", window ends with the {self.window_end}"


def names() -> list[str]:
    """Every preset that `load` knows."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for folder in _FOLDERS
        for entry in _configs().joinpath(folder).iterdir()
        if entry.name.endswith(".yaml")
    )


def load(name: str) -> Preset:
    """The preset called `name`, or in a .yaml file of the user's; `FastKVConfigError` with the names there are."""
    if name.endswith(".yaml") and Path(name).is_file():
        return _from_file(Path(name))
    for folder in _FOLDERS:
        file = _configs().joinpath(folder, f"{name}.yaml")
        if name in names() and file.is_file():
            preset = dict(yaml.safe_load(file.read_text(encoding="utf-8"))["preset"])
            return Preset(name, preset.pop("window_end"), preset)
    raise FastKVConfigError(f"unknown preset {name!r}; there are: {', '.join(names())}")


def _from_file(path: Path) -> Preset:
    """A file like those of configs/: only its `preset` section counts."""
    try:
        preset = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["preset"])
        window_end = preset.pop("window_end")
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, KeyError) as error:
        raise FastKVConfigError(f"{path} has no usable section 'preset': {error}") from error
    if window_end not in ("question", "prompt"):
        raise FastKVConfigError(f"{path}: window_end must be 'question' or 'prompt', got {window_end!r}")
    for name in preset.keys() - set(settings_of("fastkv")):
        raise FastKVConfigError(f"{path}: {name} is not a setting; there are: {', '.join(settings_of('fastkv'))}")
    return Preset(path.stem, window_end, preset)


def for_model(model: str) -> Preset:
    """The preset of a model by its short name or Hub id; "default" for a model nobody has measured."""
    for entry in _configs().joinpath("models").iterdir():
        name = entry.name.removesuffix(".yaml")
        source = yaml.safe_load(entry.read_text(encoding="utf-8"))["source"]
        if model.lower() in (name, str(source.get("hub", name)).lower()):
            return load(name)
    return load("default")


def check_method(method: object) -> None:
    """Raise `FastKVConfigError` for a name that no method has."""
    if method not in NAMES:
        raise FastKVConfigError(f"unknown method {method!r}; there are: {', '.join(NAMES)}")


def settings_of(method: str) -> tuple[str, ...]:
    """The settings a method takes, in the order of its dataclass."""
    from fastkv_jax.methods.registry import METHODS

    check_method(method)
    return tuple(field.name for field in dataclasses.fields(METHODS[method]) if field.name not in HIDDEN)


def settings(method: "Method") -> dict[str, Any]:
    """The settings of a method as plain values; another method within it as text."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(cast(Any, method))}
    return {name: repr(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def build(method: str, preset: Preset, given: Mapping[str, Any], num_layers: int | None) -> "Method":
    """The method with a preset's settings, each replaced, partner included, where `given` has one.

    A compression or selection is given by its name and built in the same way, with the budget for itself.
    `num_layers` None checks the settings alone, before the model is known. Raises `FastKVConfigError` for a setting
    that no part of the method has, both of a pair, or values that cannot work.
    """
    from fastkv_jax.methods.registry import METHODS

    parts = {name: given[name] for name in PARTS if name in given and name in settings_of(method)}
    fields = {name for part in (method, *parts.values()) for name in settings_of(part)}
    for name, value in given.items():
        flag, partner = f"--{name.replace('_', '-')}", PARTNERS.get(name, "")
        if name not in fields:
            raise FastKVConfigError(f"{flag} {value} is not a setting of method {method!r}")
        if partner in given:
            other = f"--{partner.replace('_', '-')}"
            raise FastKVConfigError(f"{flag} {value} and {other} {given[partner]} exclude each other; give one")
    kept = {name: value for name, value in preset.settings.items() if PARTNERS.get(name) not in given}
    chosen = {**kept, **{name: value for name, value in given.items() if name not in PARTS}}
    own = {name: value for name, value in chosen.items() if name in settings_of(method)}
    for name, part in parts.items():
        own[name] = build(part, Preset(preset.name, preset.window_end, {}), _for_part(part, chosen), num_layers)
    if "compression" in parts:
        own = {name: value for name, value in own.items() if name not in ("retention_rate", "capacity")}
    for name in ("tsp_layer", "filter_layer"):
        if name in settings_of(method) and own.get(name) is None and PARTNERS.get(name) not in own:
            own[name] = chosen.get("tsp_layer") or max((num_layers or 0) // 2 - 1, 0)
    built = METHODS[method](**own)
    if num_layers is not None:
        built.check(num_layers)
    return built


def _for_part(part: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name in settings_of(part) and name not in PARTS}


def _configs() -> Any:
    return importlib.resources.files("fastkv_jax") / "configs"
