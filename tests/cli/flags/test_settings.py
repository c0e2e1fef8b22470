"""The method's flags are the fields of the methods' dataclasses, no more and no less."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from fastkv_jax.cli import generate
from fastkv_jax.cli.flags import common, settings
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods import METHODS, NAMES, presets

FIELDS = sorted({name for method in METHODS for name in presets.settings_of(method)})


def options(*words):
    return generate.parser().parse([str(word) for word in words])


def test_the_names_are_those_of_the_registry():
    assert tuple(METHODS) == NAMES


def test_every_field_but_those_for_python_is_a_setting():
    for method, kind in METHODS.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        assert set(presets.settings_of(method)) == fields - {"published", "base"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_flag_and_a_help_text(name):
    flags = common.Parser()
    settings.add_method_flags(flags)
    (action,) = [action for action in flags._actions if action.dest == name]
    assert action.option_strings == [f"--{name.replace('_', '-')}"]
    assert action.help and action.default is None and not action.required


def test_no_help_text_is_left_over():
    assert set(settings._SETTINGS) == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_gives_the_type_of_its_field(name):
    field = next(f for kind in METHODS.values() for f in dataclasses.fields(kind) if f.name == name)
    allowed = typing.get_args(field.type)
    if name in presets.PARTS:
        given, wanted = "keydiff", "keydiff"
    elif name == "tsp_layers":
        given, wanted = "1,2", (1, 2)
    elif typing.get_origin(field.type) is typing.Literal:
        given, wanted = allowed[-1], allowed[-1]
    elif field.type is int or int in allowed:
        given, wanted = "9", 9
    else:
        given, wanted = "0.25", 0.25
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        found = getattr(options(flag, given), name)
        assert found == wanted and type(found) is type(wanted)


def test_several_tsp_layers_and_their_rates():
    given = options("--tsp-layers", "10,15,20", "--tsp-rate", "0.5,0.3,0.2")
    _, method = settings.method(given, "smollm2-135m", 30)
    assert method.tsp_layers == (10, 15, 20) and method.tsp_rate == (0.5, 0.3, 0.2) and method.tsp_layer is None
    assert options("--tsp-layers", "10").tsp_layers == (10,)
    with pytest.raises(SystemExit):
        options("--tsp-layers", "10,x")


def test_all_flags_of_the_command_have_help():
    assert all(action.help for action in generate.parser()._actions)


def test_settings_not_given_come_from_the_preset_of_the_model():
    preset, method = settings.method(options("--kernel-size", 5), "smollm2-135m", 30)
    assert preset.name == "smollm2-135m"
    assert (method.kernel_size, method.window_size, method.tsp_layer) == (5, 16, 14)
    preset, method = settings.method(options("--preset", "paper"), "smollm2-135m", 30)
    assert preset.name == "paper" and (method.kernel_size, method.tsp_layer) == (7, 14)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window-size", 0], "window_size must be"),
        (["--method", "full", "--pooling", "avg"], "--pooling avg is not a setting of method 'full'"),
        (["--capacity", 8, "--retention-rate", 0.5], "exclude each other"),
        (["--preset", "none"], "unknown preset 'none'"),
    ],
)
def test_settings_are_checked_without_a_model(words, message):
    with pytest.raises(FastKVConfigError, match=message):
        settings.check(options(*words))


def test_layers_are_checked_with_the_model():
    given = options("--tsp-layer", 29)
    settings.check(given)
    with pytest.raises(FastKVConfigError, match="tsp_layer 29 is outside 0…28 for a 30-layer model"):
        settings.method(given, "smollm2-135m", 30)


@pytest.mark.parametrize("command", ["generate", "evaluate", "benchmark", "calibrate", "convert"])
def test_a_help_text_does_not_wait_for_jax(command):
    code = f"""import sys
from fastkv_jax.cli import {command}
try:
    {command}.main(["--help"])
except SystemExit:
    print("jax" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage" in done.stdout and done.stdout.endswith("False\n")
