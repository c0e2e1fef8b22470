"""Settings by name: every file of configs/, and how a caller's own settings replace them."""

from pathlib import Path

import pytest
import yaml

from fastkv_jax.checkpoint import known_models
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.methods import METHODS, FastKV, FullKV, GemFilter, KeyDiff, StreamingLLM, presets

FILES = sorted((Path(__file__).parents[2] / "configs").glob("m*/*.yaml"))  # models and methods, not suites
PAPER_LAYERS = {"llama-3.1-8b-instruct": (32, 15), "ministral-8b-instruct": (36, 17),
                "mistral-nemo-12b-instruct": (40, 19)}  # fmt: skip


def preset(**settings):
    return presets.Preset("test", "question", settings)


def test_every_file_is_a_preset():
    assert presets.names() == sorted(file.stem for file in FILES) and len(FILES) >= 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_preset_loads_and_builds(file):
    found = presets.load(file.stem)
    assert found.name == file.stem and found.window_end in ("question", "prompt")
    assert set(found.settings) <= set(presets.settings_of("fastkv"))
    layers = PAPER_LAYERS.get(file.stem, (30, None))[0]
    for method in METHODS:
        built = presets.build(method, found, {}, layers)
        assert isinstance(built, METHODS[method])
        hash(built)  # a static argument of jit
        line = found.describe(method, built)
        assert line.startswith(f"{file.stem}: {method}") and line.endswith(f"window ends with the {found.window_end}")
    given = {name: value for name, value in found.settings.items() if value is not None}
    assert given.items() <= presets.settings(presets.build("fastkv", found, {}, layers)).items()


def test_a_known_model_is_a_preset_of_its_own_name():
    for name in known_models.names():
        assert presets.for_model(name).name == name


@pytest.mark.parametrize("name", PAPER_LAYERS)
def test_the_models_of_the_paper_are_found_by_their_hub_id(name):
    (file,) = [file for file in FILES if file.stem == name]
    hub = yaml.safe_load(file.read_text())["source"]["hub"]
    assert presets.for_model(hub) == presets.for_model(hub.lower()) == presets.load(name)
    layers, tsp_layer = PAPER_LAYERS[name]
    assert presets.build("fastkv", presets.load(name), {}, layers).tsp_layer == tsp_layer


@pytest.mark.parametrize("model", ["", "none", "None", "somebody/model", "some/model/folder", "paper"])
def test_a_model_nobody_has_measured_gets_the_default(model):
    assert presets.for_model(model).name == "default"


def test_the_paper_has_no_floor_and_its_window_at_the_end():
    paper = presets.load("paper")
    assert paper.window_end == "prompt"
    assert presets.build("fastkv", paper, {}, 32) == FastKV(
        tsp_layer=15, tsp_rate=0.2, retention_rate=0.1, window_size=8, kernel_size=7, pooling="max"
    )


@pytest.mark.parametrize("name", ["", "Paper", "../methods/paper", "paper.yaml", "methods/paper", "none"])
def test_an_unknown_preset_is_named_with_those_there_are(name):
    with pytest.raises(FastKVConfigError) as error:
        presets.load(name)
    assert str(error.value) == f"unknown preset {name!r}; there are: {', '.join(presets.names())}"


@pytest.mark.parametrize(("name", "partner"), presets.PARTNERS.items())
def test_a_setting_replaces_its_partner(name, partner):
    values = {"tsp_rate": 0.5, "tsp_length": 64, "retention_rate": 0.15, "capacity": 32}
    values |= {"tsp_layer": 2, "tsp_layers": (0, 1)}
    settings = {"tsp_layer": 1} | {partner: values[partner]}
    settings = {key: value for key, value in settings.items() if key == partner or presets.PARTNERS[key] != partner}
    built = presets.build("fastkv", preset(**settings), {name: values[name]}, 4)
    assert getattr(built, name) == values[name] and getattr(built, partner) is None
    with pytest.raises(FastKVConfigError, match="exclude each other; give one") as error:
        presets.build("fastkv", preset(), {name: values[name], partner: values[partner]}, 4)
    for field in (name, partner):
        assert f"--{field.replace('_', '-')} {values[field]}" in str(error.value)


def test_partners_are_mutual():
    assert all(presets.PARTNERS[partner] == name for name, partner in presets.PARTNERS.items())


def test_another_method_may_keep_the_entries_or_choose_the_tokens():
    given = {"compression": "keydiff", "capacity": 64, "selection": "gemfilter", "tsp_layer": 2}
    built = presets.build("fastkv", preset(retention_rate=0.5, window_size=5), given, 6)
    assert built == FastKV(
        tsp_layer=2,
        window_size=5,
        compression=KeyDiff(capacity=64, window_size=5),
        selection=GemFilter(filter_layer=2, capacity=64, window_size=5),
    )
    with pytest.raises(FastKVConfigError, match="--sinks 3 is not a setting of method 'fastkv'"):
        presets.build("fastkv", preset(), {"compression": "keydiff", "sinks": 3, "tsp_layer": 1}, 6)
    kept = presets.build("fastkv", preset(), {"compression": "streamingllm", "sinks": 3, "tsp_layer": 1}, 6)
    assert kept.compression == StreamingLLM(sinks=3)


def test_a_method_there_is_not():
    with pytest.raises(FastKVConfigError, match="unknown method 'fast'; there are: full, fastkv"):
        presets.build("fast", preset(), {}, 4)


def test_a_setting_the_method_does_not_have():
    with pytest.raises(FastKVConfigError, match="--capacity 8 is not a setting of method 'full'"):
        presets.build("full", preset(), {"capacity": 8}, 4)
    assert presets.build("full", preset(tsp_layer=1, tsp_rate=0.2), {}, 4) == FullKV()


@pytest.mark.parametrize(("layers", "expected"), [(2, 0), (3, 0), (4, 1), (30, 14), (32, 15), (40, 19)])
def test_an_unknown_tsp_layer_is_half_the_layers(layers, expected):
    assert presets.build("fastkv", preset(tsp_layer=None), {}, layers).tsp_layer == expected
    assert presets.build("fastkv", preset(), {}, layers).tsp_layer == expected
    assert presets.build("fastkv", preset(tsp_layer=0), {}, layers).tsp_layer == 0


def test_a_model_must_have_the_tsp_layer_unless_it_is_unknown():
    given = {"tsp_layer": 9}
    assert presets.build("fastkv", preset(), given, None).tsp_layer == 9
    with pytest.raises(FastKVConfigError, match="tsp_layer 9 is outside 0…2 for a 4-layer model"):
        presets.build("fastkv", preset(), given, 4)


def test_a_model_of_one_layer_has_nothing_to_propagate_to():
    with pytest.raises(FastKVConfigError, match="1-layer model") as error:
        presets.build("fastkv", preset(), {}, 1)
    assert "-1" not in str(error.value)
