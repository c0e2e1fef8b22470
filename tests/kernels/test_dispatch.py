"""The implementation is the caller's explicit choice; TPU kernels keep to their memory, and their cores apart."""

import functools
import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import jit
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas
from kernels_pallas import Slots, dispatch

RANDOM = np.random.default_rng(0)
ROWS = 3  # an odd number: were the tiles of a row shared out to two cores, the second row's would be split
EDGES = jnp.array([3, 0, 9]), jnp.array([40, 33, 31])


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=(ROWS, *shape)), jnp.float32)


def window_scores():
    q, k = normal(4, 8, 4), normal(1, 40, 4)
    return lambda **choice: kernels_pallas.window_scores(q, k, *EDGES, kernel_size=5, pooling="max", **choice)


def select():
    scores, count = normal(300), jnp.array([20, 7, 30])
    return lambda **choice: kernels_pallas.select(scores, count, 30, **choice)


def among_best():
    scores, count = normal(300), jnp.array([20, 7, 30])
    return lambda **choice: kernels_pallas.among_best(scores, count, **choice)


def decode_attention():
    positions = jnp.asarray(RANDOM.integers(-1, 2, (ROWS, 2, 13)), jnp.int32)
    prompt, new = Slots(normal(2, 13, 8), normal(2, 13, 8), positions), Slots(normal(2, 5, 8), normal(2, 5, 8))
    given = normal(4, 8), prompt, new, jnp.array([2, 5, 1])
    return lambda **choice: kernels_pallas.decode_attention(*given, **choice)


OPS = {op.__name__: op for op in (window_scores, select, among_best, decode_attention)}
SMALL_TILES = {
    "window_scores": {"keys": 16, "chunk": 8, "keep": True},
    "select": {"rows": 8},
    "decode_attention": {"slots": 4},
}
every_op = pytest.mark.parametrize("op", list(OPS))


@every_op
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_the_public_function_runs_every_implementation(op: str, implementation: str):
    run = OPS[op]()
    ours, reference = jit(functools.partial(run, implementation=implementation, interpret=True))(), run()
    assert ours.dtype == reference.dtype
    np.testing.assert_allclose(jnp.asarray(ours, jnp.float32), jnp.asarray(reference, jnp.float32), rtol=0, atol=1e-5)


@every_op
def test_an_implementation_that_is_not_there_is_refused(op: str):
    with pytest.raises(ValueError, match="must be 'reference', 'tpu' or 'gpu', not 'cuda'"):
        OPS[op]()(implementation="cuda")


@every_op
def test_two_cores_that_share_a_tpu_do_not_race(op: str, monkeypatch):
    """The grid axes called parallel go to two simulated cores, whose accesses are checked for an order."""
    state = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    folder = "select" if op == "among_best" else op
    tpu = dispatch.kernels(folder, "tpu")
    tiles = tpu.Tiles(**SMALL_TILES[folder])  # several to a row: a sum over tiles must stay on one core
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    monkeypatch.setattr(tpu, "tiles_for", lambda *_: tiles)
    monkeypatch.setattr(tpu, "tpu_interpret", lambda interpret: params)
    np.asarray(jit(functools.partial(OPS[op](), implementation="tpu", interpret=True))())
    assert state.races is not None and not state.races.races_found
