"""A calibration of the tiny model, made once for all who look at it."""

from functools import cache

import numpy as np

import fastkv_jax as fk
from examples import model_a
from fastkv_jax.calibration.result import Calibration
from fastkv_jax.calibration.rules import Setting
from fastkv_jax.calibration.samples import Sample

LAYERS, NEW = (0, 1, 2), 12
RATES = {"tsp_rate": 0.4, "retention_rate": 0.3}


GRID = {"window_sizes": (4, 8), "kernel_sizes": (3, 7)}
TRIED, OTHER = Setting(8, 7, "max"), Setting(4, 3, "max")


PROMPTS = [np.random.default_rng(n).integers(0, 128, n) for n in (140, 201, 255)]  # of one bucket
ENDS = (0, 3, 5)


def fastkv(setting: Setting, layer: int, **rates) -> fk.FastKV:
    return fk.FastKV(tsp_layer=layer, **{**RATES, **rates}, **setting._asdict())


def row(i: int):
    return *fk.pad_batch([PROMPTS[i]]), {"window_end": ENDS[i], "max_new_tokens": NEW}


@cache
def generated(i: int, method) -> tuple[int, ...]:
    tokens, start, options = row(i)
    return tuple(np.asarray(fk.generate(model_a(), tokens, start, method=method, **options).tokens)[0].tolist())


@cache
def read(i: int, method):
    tokens, start, options = row(i)
    return fk.prefill(model_a(), tokens, start, method=method, **options)


@cache
def samples() -> tuple[Sample, ...]:
    """The first answer is what full context says, the second what one setting says, the last stands in its prompt."""
    answers = generated(0, fk.FullKV())[1:4], generated(1, fastkv(TRIED, 0))[2:5], PROMPTS[2][60:67]
    return tuple(
        Sample(tuple(map(int, p)), end, tuple(map(int, a))) for p, end, a in zip(PROMPTS, ENDS, answers, strict=True)
    )


@cache
def found() -> Calibration:
    steps = []
    result = fk.calibrate(
        model_a(), samples(), name="A", layers=LAYERS, **GRID, **RATES, finalists=1, max_new_tokens=NEW,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    total = 3 * (1 + len(LAYERS))
    assert steps == [(done, total) for done in range(1, total + 1)]
    return result


def one_setting(samples, layers=LAYERS, **options):
    """A calibration of `TRIED` alone: after `found`, hardly anything is left to compile."""
    given = {"window_sizes": [8], "kernel_sizes": [7], "max_new_tokens": NEW, **RATES, **options}
    return fk.calibrate(model_a(), samples, layers=layers, **given)
