"""What is searched, and what is refused before anything runs."""

import dataclasses
import re

import pytest
from calibrated import one_setting, samples

import fastkv_jax as fk
from examples import model_a
from fastkv_jax.calibration import search
from fastkv_jax.calibration.samples import Sample


def test_options_are_described_as_they_are_taken():
    described = search.CalibrationOptions
    assert [field.name for field in dataclasses.fields(search.Search)] == list(described.__annotations__)
    for name in described.__annotations__:
        assert re.search(rf"^ +{name}: ", described.__doc__, re.MULTILINE), name


def test_the_candidates_are_the_middle_half_unless_given():
    assert [search._middle(n) for n in (30, 4, 2)] == [tuple(range(7, 23)), (1, 2), (0,)]
    assert one_setting(samples()[2:], None).layers == (1, 2)


ONE = {"layers": (1,), "window_sizes": (4,), "kernel_sizes": (3,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 3)}, "tsp_layer 3 is outside 0…2 for a 4-layer model"),
        ({"layers": (-1,)}, "tsp_layer must be an integer >= 0, got -1"),
        ({"layers": ()}, "layers must hold at least one each, got none"),
        ({"kernel_sizes": ()}, "window_sizes, kernel_sizes and poolings must hold at least one each, got none"),
        ({"kernel_sizes": (4,)}, "kernel_size must be an odd integer >= 1, got 4"),
        ({"window_sizes": (0,)}, "window_size must be an integer >= 1, got 0"),
        ({"poolings": ("sum",)}, "pooling must be 'max' or 'avg', got 'sum'"),
        ({"tsp_rate": 1.5}, "tsp_rate must be in (0, 1], got 1.5"),
        ({"retention_rate": 0}, "retention_rate must be in (0, 1], got 0"),
        ({"tolerance": -0.1}, "tolerance must be >= 0, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0, got nan"),
        ({"finalists": 0}, "finalists must be an integer >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"samples": ()}, "samples must hold at least one each, got none"),
        ({"samples": (Sample((1, 2, 3)), Sample((200,) * 16))},
         "sample 2: token id 200 at [0, 0] is outside the vocabulary of 128"),
        ({"samples": (Sample((1, 2, 3), 3),)}, "sample 1: window_end 3 leaves no question in row 0 (3 tokens)"),
        ({"samples": (Sample((1, 2, 3)),), "kernel_sizes": (3, 5)},
         "no sample has an answer: 2 settings cannot be compared, give one window and one kernel"),
        ({"samples": (Sample((1, 2, 3), 0, (4,)),), "kernel_sizes": (3, 5)},
         "no answer stands in its prompt: 2 settings cannot be compared, give one window and one kernel"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(options, message, monkeypatch):
    monkeypatch.setattr("fastkv_jax.calibration.measuring.survey", lambda *_: pytest.fail("something ran"))
    given = {**ONE, **options}
    with pytest.raises((fk.FastKVConfigError, fk.InputError)) as error:
        fk.calibrate(model_a(), given.pop("samples", (Sample((1, 2, 3), 0, (2,)),)), **given)
    assert str(error.value) == message
