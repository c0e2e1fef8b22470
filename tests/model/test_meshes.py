"""Spread over devices by heads, by rows or by tokens, every method keeps the same entries and says the same."""

import math
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import fastkv_jax as fk
from examples import BUCKET, EXAMPLES, GOLDEN, MODEL_A, NEW, PROMPTS, arrays, filled_by_head, layers, model_a
from fastkv_jax.benchmarks.compiled.flops import flops
from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.decoding.loop import compile_decode
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.sharding import split
from tolerances import CACHE

MESHES = {
    "data=8": {"data": 8},
    "model=2": {"model": 2},
    "data=2, model=2": {"data": 2, "model": 2},
    "sequence=4": {"sequence": 4},
    "data=2, model=2, sequence=2": {"data": 2, "model": 2, "sequence": 2},
}
ROWS = [*PROMPTS, PROMPTS[3][:40], PROMPTS[5][:200]]
METHODS = {name: examples[0] for name, examples in EXAMPLES.items()} | {
    "fastkv, several TSP layers": EXAMPLES["fastkv"][3],
    "fastkv with a flat cache": EXAMPLES["fastkv"][4],
    "snapkv, per query head": EXAMPLES["snapkv"][1],
}
# Decoding sees the layout of a cache, not who made it: one method for each is decoded, the others only read.
DECODED = ("full", "fastkv", "fastkv, several TSP layers", "fastkv with a flat cache", "snapkv, per query head", "asl")


@cache
def spread_model(mesh: str) -> Llama:
    return spread(MODEL_A, MESHES[mesh])


def spread(path: Path, axes: dict[str, int]) -> Llama:
    devices = jax.devices()[: math.prod(axes.values())]
    return fk.load_model(path, dtype="float32", mesh=jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices))


def made(model: Llama, name: str) -> tuple[KVCache, Array | None]:
    """The cache, and the tokens of those that decode."""
    tokens, start = fk.pad_batch(ROWS, BUCKET)
    if name not in DECODED:
        return fk.prefill(model, tokens, start, method=METHODS[name], max_new_tokens=NEW).cache, None
    said = fk.generate(model, tokens, start, method=METHODS[name], max_new_tokens=NEW, stop_tokens=())
    return said.cache, said.tokens


@cache
def alone(name: str) -> tuple[KVCache, Array | None]:
    """On one device."""
    return made(model_a(), name)


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
    (ours, said), (theirs, expected) = made(spread_model(mesh), name), alone(name)
    assert (said is None) == (expected is None) == (name not in DECODED)
    np.testing.assert_array_equal(said, expected)
    here = jax.tree.map(np.asarray, ours)  # so that one program takes the layers out, whatever the mesh
    for one, two in zip(layers(here), layers(theirs), strict=True):
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


INSTRUCTION = re.compile(r"(%\S+) = (.+?) ([\w-]+)\((.*?)\)")  # name, shapes, operation, operands
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-", "ragged-all-to-all", "reduce-scatter")


def sizes_sent(program: jax.stages.Compiled) -> set[int]:
    """How many numbers are in the arrays that devices take from, or make for, each other."""
    text = INSTRUCTION.findall(program.as_text())
    sizes = {
        name: {math.prod(map(int, filter(None, shape.split(",")))) for shape in re.findall(r"\[([\d,]*)\]", shapes)}
        for name, shapes, _, _ in text
    }
    sent = [[name, *re.findall(r"%[\w.-]+", given)] for name, _, kind, given in text if kind.startswith(COLLECTIVES)]
    return {size for names in sent for name in names for size in sizes[name]}


def sizes_of_weights(model: Llama) -> set[int]:
    """The same of every weight, and of one layer's part of it."""
    return {a.size for a in jax.tree.leaves(model)} | {a[0].size for a in jax.tree.leaves(model.layers)}


@pytest.mark.parametrize("mesh", ["data=8", "model=2", "data=2, model=2, sequence=2"])
def test_no_weight_is_sent_from_device_to_device(mesh: str):
    model = spread_model(mesh)
    tokens, start = fk.pad_batch(3 * ROWS, BUCKET)  # sizes of weights are powers of two, those of activations are not
    prefill = jax.jit(partial(fk.prefill, method=METHODS["fastkv"], max_new_tokens=NEW))
    read = prefill.lower(model, tokens, start).compile()
    step = compile_decode(model, read(model, tokens, start))
    assert not sizes_sent(read) & sizes_of_weights(model)
    assert not sizes_sent(step) & sizes_of_weights(model)


@pytest.mark.parametrize("name", ["wk", "wo", "w_down"])
def test_a_weight_that_is_sent_would_be_seen(name: str):
    model = spread_model("data=2, model=2, sequence=2")
    stack, layer = getattr(model.layers, name), getattr(model.layer(jnp.int32(0)), name)
    for weight in (stack, layer, model.embedding):
        gathered = jax.jit(lambda a: split(a, model.mesh)).lower(weight[...]).compile()
        assert weight[...].size in sizes_sent(gathered) & sizes_of_weights(model)


def test_of_a_batch_s_tokens_spread_over_four_devices_each_does_a_quarter_of_the_work():
    prefill = jax.jit(partial(fk.prefill, method=METHODS["full"], max_new_tokens=NEW))
    tokens, start = fk.pad_batch(ROWS, BUCKET)
    alone, spread = (
        flops(prefill.lower(model, tokens, start).compile().as_text())
        for model in (model_a(), spread_model("sequence=4"))
    )
    assert 0.2 < spread / alone < 0.3


@pytest.fixture(scope="module")
def thirds(load_short: Callable[..., Llama]) -> Llama:
    """A trained model of nine query heads and three KV heads."""
    return load_short(jax.make_mesh((3,), ("model",), devices=jax.devices()[:3]))


def test_each_of_three_devices_holds_a_third_of_the_heads(thirds: Llama):
    shares = {"wq": (6, 192, 576), "wk": (6, 64, 576), "wv": (6, 64, 576), "wo": (6, 576, 192)}
    for name, share in shares.items():
        held = getattr(thirds.layers, name)[...].addressable_shards
        assert [a.data.shape for a in held] == 3 * [share]
        assert len({a.device for a in held}) == len({str(a.index) for a in held}) == 3


def test_a_trained_model_keeps_and_says_the_same_on_three_devices(load_short: Callable[..., Llama], thirds: Llama):
    text = arrays(GOLDEN / "real" / "dev_niah1k_fullkv.npz")["input_ids"][-300:]
    method = fk.FastKV(tsp_layer=2, tsp_rate=0.2, retention_rate=0.2, min_prompt_to_compress=0)
    ours, theirs = (
        fk.generate(model, *fk.pad_batch([text]), method=method, max_new_tokens=NEW, stop_tokens=())
        for model in (thirds, load_short())
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    for one, two in zip(layers(ours.cache), layers(theirs.cache), strict=True):
        assert (one.positions >= 0).sum(axis=-1).tolist() == [[60, 60, 60]]
        np.testing.assert_array_equal(one.positions, two.positions)
