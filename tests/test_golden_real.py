"""The library against recorded runs of the published FastKV code on a trained model, SmolLM2-135M-Instruct.

Recordings with the same settings form one ragged batch; each batch is read and decoded once.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import fastkv_jax as fk
from examples import GOLDEN, arrays, filled, layers
from fastkv_jax.decoding.loop import decode_chunks
from fastkv_jax.methods.base import Method
from tolerances import REAL_GAP, REAL_LOGITS, REAL_SETS

FOLDER = GOLDEN / "real"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))
COMPRESSED = [name for name in CASES if "fullkv" not in name]
STEPS = 32
RUNS: dict[Method, dict[str, dict[str, np.ndarray]]] = {}


@cache
def case(name: str) -> dict[str, np.ndarray]:
    return arrays(FOLDER / f"{name}.npz")


def method_of(name: str) -> Method:
    meta = json.loads(str(case(name)["meta"]))
    if meta["method"] == "fullkv":
        return fk.FullKV()
    return fk.FastKV(
        tsp_layer=meta["tsp_idx"],
        tsp_rate=meta["tsp_rate"],
        retention_rate=meta["retain_rate"],
        window_size=meta["window_size"],
        kernel_size=meta["kernel_size"],
        pooling=meta["pooling"].removesuffix("pool"),
    )


@pytest.fixture(scope="module")
def model(smollm2_path: Path):
    return fk.load_model(smollm2_path, dtype="float32")


@pytest.fixture
def ours(request, model) -> dict[str, np.ndarray]:
    """What the library makes of the prompt of the test's case."""
    name = request.getfixturevalue("name")
    method = method_of(name)
    if method not in RUNS:
        names = [other for other in CASES if method_of(other) == method]
        tokens, start = fk.pad_batch([case(other)["input_ids"] for other in names])
        prompt = fk.prefill(model, tokens, start, method=method, max_new_tokens=STEPS)
        arrays_of = {"logits": np.asarray(prompt.logits)}
        if prompt.propagated is not None:
            arrays_of["propagated"] = np.asarray(prompt.propagated)
        arrays_of |= {f"positions_{i}": entries.positions for i, entries in enumerate(layers(prompt.cache))}
        chunks = decode_chunks(model, prompt, max_new_tokens=STEPS, stop_tokens=())
        arrays_of["tokens"] = np.concatenate([chunk for chunk, _ in chunks], axis=1)
        RUNS[method] = {other: {key: a[b] for key, a in arrays_of.items()} for b, other in enumerate(names)}
    return RUNS[method][name]


def assert_nearly_equal_sets(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Of equal size, and up to a share of REAL_SETS the same members."""
    assert ours.shape == theirs.shape
    differing = len(np.setdiff1d(ours, theirs))
    assert differing <= REAL_SETS * len(theirs), f"{differing} of {len(theirs)} entries differ"


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_recorded_ones(name: str, ours: dict[str, np.ndarray]):
    np.testing.assert_allclose(ours["logits"], case(name)["prefill_logits"], rtol=0, atol=REAL_LOGITS)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_the_recorded_ones_while_the_choice_is_clear(name: str, ours: dict[str, np.ndarray]):
    unclear = np.flatnonzero(case(name)["top2_gap"] < REAL_GAP)
    steps = unclear[0] if unclear.size else STEPS
    assert steps > 0
    assert ours["tokens"][:steps].tolist() == case(name)["tokens"][:steps].tolist()


@pytest.mark.parametrize("name", COMPRESSED)
def test_propagates_the_recorded_rows(name: str, ours: dict[str, np.ndarray]):
    assert_nearly_equal_sets(filled(ours["propagated"][None])[0], case(name)["tsp_idx"])


@pytest.mark.parametrize("name", COMPRESSED)
def test_keeps_the_recorded_entries_in_all_layers_and_heads(name: str, ours: dict[str, np.ndarray]):
    recorded, method = case(name), method_of(name)
    n = len(recorded["input_ids"])
    differing = total = 0
    for i in range(30):
        entering = np.arange(n) if i <= method.tsp_layer else recorded["tsp_idx"]
        kept = filled(ours[f"positions_{i}"])
        theirs = entering[recorded[f"kept_{i}"]]  # recorded as rows of the layer, without the window
        assert kept.shape == (3, theirs.shape[1] + method.window_size)
        np.testing.assert_array_equal(
            kept[:, -method.window_size :], np.tile(np.arange(n)[-method.window_size :], (3, 1))
        )
        for head in range(3):
            differing += len(np.setdiff1d(kept[head, : -method.window_size], theirs[head]))
            total += theirs.shape[1]
    assert differing <= REAL_SETS * total, f"{differing} of {total} entries differ"


def test_the_recordings_are_all_here():
    assert len(CASES) == 7 and len(COMPRESSED) == 5
