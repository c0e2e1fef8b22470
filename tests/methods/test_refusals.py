"""Settings that cannot work are refused by every method, with the setting, its value and its range."""

import dataclasses
import math
from typing import Any

import pytest

import fastkv_jax as fk
from examples import NEW, layers, model_a, ragged

NEEDS: dict[str, dict[str, Any]] = {
    "fastkv": {"tsp_layer": 1},
    "claa": {"tsp_layer": 1},
    "gemfilter": {"filter_layer": 1},
}
BAD = [
    ({"window_size": 9, "capacity": 8}, r"window_size \(9\) must not exceed capacity \(8\)"),
    ({"window_size": 0}, "window_size must be an integer >= 1, got 0"),
    ({"window_size": 2.5}, "window_size must be an integer >= 1, got 2.5"),
    ({"kernel_size": 4}, "kernel_size must be an odd integer >= 1, got 4"),
    ({"kernel_size": 0}, "kernel_size must be an odd integer >= 1, got 0"),
    ({"pooling": "maxpool"}, "pooling must be 'max' or 'avg', got 'maxpool'"),
    ({"retention_rate": 0}, r"retention_rate must be in \(0, 1\], got 0"),
    ({"retention_rate": 1.5}, r"retention_rate must be in \(0, 1\], got 1.5"),
    ({"retention_rate": math.nan}, r"retention_rate must be in \(0, 1\], got nan"),
    ({"capacity": 0}, "capacity must be an integer >= 1, got 0"),
    ({"retention_rate": 0.2, "capacity": 50}, "give one of retention_rate and capacity; .* are both set"),
    ({"min_prompt_to_compress": -1}, "min_prompt_to_compress must be an integer >= 0, got -1"),
    ({"tsp_rate": 1.5}, r"tsp_rate must be in \(0, 1\], got 1.5"),
    ({"tsp_rate": 0.2, "tsp_length": 50}, "give one of tsp_rate and tsp_length; .* are both set"),
    ({"sinks": -1}, "sinks must be an integer >= 0, got -1"),
    ({"filter_layer": -1}, "filter_layer must be an integer >= 0, got -1"),
    ({"filter_layer": None}, "give filter_layer, the layer that chooses the tokens"),
    ({"recent_ratio": 0}, r"recent_ratio must be in \(0, 1\], got 0"),
    ({"decay_ratio": 2}, r"decay_ratio must be in \(0, 1\], got 2"),
    ({"distance_weight": 0}, "distance_weight must be > 0, got 0"),
    ({"min_context": -1}, "min_context must be an integer >= 0, got -1"),
    ({"beta": 0}, "beta must be an integer >= 1, got 0"),
    ({"score_layers": 0}, "score_layers must be an integer >= [12], got 0"),
    ({"full_layers": -1}, "full_layers must be an integer >= 0, got -1"),
    ({"threshold": 0}, r"threshold must be in \(0, 1\], got 0"),
    ({"future": 0}, "future must be an integer >= 1, got 0"),
]
CASES = [
    pytest.param(kind, NEEDS.get(name, {}) | bad, message, id=f"{name} {bad}")
    for name, kind in fk.METHODS.items()
    for bad, message in BAD
    if set(bad) <= {field.name for field in dataclasses.fields(kind)}
]


@pytest.mark.parametrize(("kind", "given", "message"), CASES)
def test_a_setting_that_cannot_work_is_refused(kind: type, given: dict[str, Any], message: str):
    with pytest.raises(fk.FastKVConfigError, match=message):
        kind(**given)


def test_every_setting_with_a_range_is_tried():
    tried = {field for bad, _ in BAD for field in bad}
    fields = {field.name for kind in fk.METHODS.values() for field in dataclasses.fields(kind)}
    free = {"published", "base", "compression", "selection", "tsp_layer", "tsp_layers", "min_layer"}
    assert fields - tried == free


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (fk.CLAA(tsp_layer=3), "tsp_layer 3 is outside 0…2 for a 4-layer model"),
        (fk.GemFilter(filter_layer=4), "filter_layer 4 is outside 0…3 for a 4-layer model"),
        (fk.ASL(min_layer=3), "min_layer 3 is outside 0…2 for a 4-layer model"),
        (fk.FastKV(tsp_layers=(1, 3)), "tsp_layer 3 is outside 0…2 for a 4-layer model"),
        (fk.FastKV(tsp_layer=1, selection=fk.GemFilter(filter_layer=9)), "filter_layer 9 is outside 0…3"),
        (
            fk.FastKV(tsp_layer=1, compression=fk.PyramidInfer()),
            "PyramidInfer drops tokens itself; it is no compression",
        ),
        (fk.FastKV(tsp_layer=1, compression=fk.GemFilter(filter_layer=1)), "GemFilter drops tokens itself"),
    ],
    ids=str,
)
def test_layers_and_parts_are_checked_with_the_model(method, message: str):
    with pytest.raises(fk.FastKVConfigError, match=message):
        fk.prefill(model_a(), [[1, 2, 3]], method=method, max_new_tokens=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of tsp_layer and tsp_layers; neither is set"),
        ({"tsp_layer": 1, "tsp_layers": (1, 2)}, "give one of tsp_layer and tsp_layers; .* are both set"),
        ({"tsp_layers": (2, 1)}, r"tsp_layers must rise, got \(2, 1\)"),
        ({"tsp_layers": ()}, r"tsp_layers must rise, got \(\)"),
        ({"tsp_layers": (1, -2)}, "each of tsp_layers must be an integer >= 0, got -2"),
        ({"tsp_layers": (0, 1), "tsp_rate": (0.5,)}, "tsp_rate has 1 values for 2 layers"),
        ({"tsp_layers": (0, 1), "tsp_rate": (0.2, 0.5)}, r"tsp_rate must not rise, got \(0.2, 0.5\)"),
        ({"tsp_layers": (0, 1), "tsp_length": (9, 20)}, r"tsp_length must not rise, got \(9, 20\)"),
        (
            {"tsp_layer": 1, "compression": fk.KeyDiff(), "retention_rate": 0.2},
            "compression brings its own budget; give no retention_rate or capacity beside it",
        ),
    ],
    ids=str,
)
def test_stages_and_parts_must_fit_each_other(given: dict[str, Any], message: str):
    with pytest.raises(fk.FastKVConfigError, match=message):
        fk.FastKV(**given)


def test_one_rate_for_several_layers_falls_evenly():
    rates = [budget.rate for _, budget in fk.FastKV(tsp_layers=(0, 1, 2), tsp_rate=0.125).boundaries]
    assert rates == pytest.approx([0.5, 0.25, 0.125])
    lengths = [budget.count for _, budget in fk.FastKV(tsp_layers=(0, 1), tsp_length=(90, 40), capacity=20).boundaries]
    assert lengths == [90, 40]


FIELDS = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in fk.METHODS.items()}


def test_all_but_two_methods_have_a_budget_in_entries():
    assert {name for name, fields in FIELDS.items() if "capacity" not in fields} == {"full", "pyramidinfer"}


@pytest.mark.parametrize("name", [name for name, fields in FIELDS.items() if "capacity" in fields])
def test_a_budget_above_the_prompt_keeps_all_of_it(name: str):
    kind = fk.METHODS[name]
    tsp = {"tsp_length": 5000} if "tsp_length" in FIELDS[name] else {}
    result = fk.prefill(
        model_a(), [list(range(40))], method=kind(capacity=5000, **tsp, **NEEDS.get(name, {})), max_new_tokens=NEW
    )
    assert [(entries.positions[0, 0] >= 0).sum() for entries in layers(result.cache)] == [40] * 4


def test_heads_that_share_a_budget_cost_no_more_memory():
    shared, even = (ragged(kind(retention_rate=0.3, window_size=5)).cache for kind in (fk.AdaKV, fk.SnapKV))
    assert shared.nbytes <= even.nbytes
    counts = [(shared.layer(i).positions >= 0).sum(axis=-1) for i in range(4)]
    assert any((count != count[:, :1]).any() for count in counts)  # and do differ
