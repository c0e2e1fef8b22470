"""Presets: every one in configs builds, and a caller's settings replace them, partners included."""

import pytest

from fastkv_jax import FastKVConfigError, presets
from fastkv_jax.cli import settings
from fastkv_jax.methods import METHODS


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_builds_every_method(name, method):
    preset = presets.load(name)
    built = presets.build(method, preset, {}, num_layers=40)
    assert preset.window_end in ("question", "prompt") and method in preset.describe(method, built)


def test_a_model_finds_its_preset_by_short_name_and_by_hub_id():
    assert presets.for_model("smollm2-135m").name == "smollm2-135m"
    assert presets.for_model("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b-instruct"
    assert presets.for_model("somebody/else").name == "default"


def test_without_a_measured_layer_it_is_half_the_layers_less_one():
    assert presets.build("fastkv", presets.load("paper"), {}, num_layers=32).tsp_layer == 15


def test_a_setting_replaces_its_partner():
    built = presets.build("fastkv", presets.load("paper"), {"capacity": 64, "tsp_length": 128}, num_layers=32)
    assert (built.capacity, built.retention_rate, built.tsp_length, built.tsp_rate) == (64, None, 128, None)


@pytest.mark.parametrize(
    ("method", "given", "complaint"),
    (
        ("fastkv", {"capacity": 64, "retention_rate": 0.1}, "exclude each other"),
        ("full", {"capacity": 64}, "--capacity 64 is not a setting of method 'full'"),
        ("fastkv", {"tsp_layer": 31}, "tsp_layer 31 is outside 0…30 for a 32-layer model"),
    ),
)
def test_what_cannot_be_combined_is_named(method, given, complaint):
    with pytest.raises(FastKVConfigError, match=complaint):
        presets.build(method, presets.load("paper"), given, num_layers=32)


def test_every_setting_of_every_method_has_a_flag_with_help():
    from fastkv_jax.cli.generate import parser

    flags = {flag: action.help for action in parser()._actions for flag in action.option_strings}
    for method in METHODS:
        for name in presets.settings_of(method):
            assert flags[f"--{name.replace('_', '-')}"], name
    assert settings._HELP.keys() == {name for method in METHODS for name in presets.settings_of(method)}
