"""Spread over devices by heads, by rows or by tokens, every method keeps the same entries and says the same."""

from functools import cache

import jax
import numpy as np
import pytest

import fastkv_jax as fk
from examples import BUCKET, EXAMPLES, MODEL_A, NEW, PROMPTS, filled_by_head, model_a
from fastkv_jax.generation import Generated
from fastkv_jax.methods.base import Method
from fastkv_jax.model import Llama
from tolerances import CACHE

MESHES = {
    "data=8": {"data": 8},
    "model=2": {"model": 2},
    "data=2, model=2": {"data": 2, "model": 2},
    "sequence=4": {"sequence": 4},
    "data=2, model=2, sequence=2": {"data": 2, "model": 2, "sequence": 2},
}
ROWS = [*PROMPTS, PROMPTS[3][:40], PROMPTS[5][:200]]
LAYERS = 4
METHODS = {name: examples[0] for name, examples in EXAMPLES.items()} | {
    "fastkv, several TSP layers": EXAMPLES["fastkv"][3],
    "fastkv with a flat cache": EXAMPLES["fastkv"][4],
    "snapkv, per query head": EXAMPLES["snapkv"][1],
}


@cache
def spread_model(mesh: str) -> Llama:
    axes = MESHES[mesh]
    devices = jax.devices()[: np.prod(list(axes.values()))]
    return fk.load_model(
        MODEL_A, dtype="float32", mesh=jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices)
    )


def made(model: Llama, method: Method) -> Generated:
    return fk.generate(model, *fk.pad_batch(ROWS, BUCKET), method=method, max_new_tokens=NEW, stop_tokens=())


@cache
def alone(name: str) -> Generated:
    """On one device."""
    return made(model_a(), METHODS[name])


@pytest.mark.parametrize(
    ("name", "mesh"),
    [(name, mesh) for name in METHODS for mesh in ("data=2, model=2", "sequence=4")]
    + [
        (name, mesh)
        for name in ("fastkv", "adakv", "gemfilter", "asl")
        for mesh in MESHES
        if "=2, s" in mesh or "8" in mesh
    ],
)
def test_every_method_keeps_and_says_the_same(name: str, mesh: str):
    ours, theirs = made(spread_model(mesh), METHODS[name]), alone(name)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    for i in range(LAYERS):
        one, two = ours.cache.layer(i), theirs.cache.layer(i)
        for row in range(len(ROWS)):
            for mine, other in zip(*(filled_by_head(a.positions[row]) for a in (one, two)), strict=True):
                np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(one.k, two.k, rtol=0, atol=CACHE)
        np.testing.assert_allclose(one.v, two.v, rtol=0, atol=CACHE)


def test_work_that_cannot_be_shared_is_refused():
    tokens, start = fk.pad_batch(ROWS[:3], BUCKET)
    with pytest.raises(fk.InputError, match="a batch of 3 rows cannot be split over the mesh axis 'data' of 8 devices"):
        fk.prefill(spread_model("data=8"), tokens, start, method=fk.FullKV(), max_new_tokens=1)
    with pytest.raises(fk.InputError, match="a batch of 7 columns cannot be split over the mesh axis 'sequence' of 4"):
        fk.prefill(spread_model("sequence=4"), tokens[:, -7:], method=fk.FullKV(), max_new_tokens=1)
