"""The library against recorded runs of transformers' own models: rotary variants, biases, norms, ties, shards.

The three recorded prompts of a model form one ragged batch.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import fastkv_jax as fk
from examples import GOLDEN, arrays
from fastkv_jax.model.llama import Llama
from tolerances import LOGITS

FOLDER = GOLDEN / "transformers"
MODELS = sorted(path.stem for path in FOLDER.glob("*.npz"))
LENGTHS = (3, 65, 301)
STEPS = 24


def assert_agrees(model: Llama, recorded: dict[str, np.ndarray]) -> None:
    tokens, start = fk.pad_batch([recorded[f"input_ids_{n}"] for n in LENGTHS])
    prompt = fk.prefill(model, tokens, start, method=fk.FullKV(), max_new_tokens=STEPS)
    expected = np.stack([recorded[f"logits_{n}"] for n in LENGTHS])
    np.testing.assert_allclose(np.asarray(prompt.logits), expected, rtol=0, atol=LOGITS)
    made = fk.generate(model, tokens, start, method=fk.FullKV(), max_new_tokens=STEPS, stop_tokens=())
    np.testing.assert_array_equal(made.tokens, np.stack([recorded[f"tokens_{n}"] for n in LENGTHS]))
    np.testing.assert_array_equal(made.lengths, [STEPS] * len(LENGTHS))


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_transformers(name: str):
    assert_agrees(fk.load_model(FOLDER / name, dtype="float32"), arrays(FOLDER / f"{name}.npz"))


def test_agrees_when_spread_over_two_devices():
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    model = fk.load_model(FOLDER / "llama3_rope", dtype="float32", mesh=mesh)
    assert len(model.layers.wq[...].sharding.device_set) == 2
    assert_agrees(model, arrays(FOLDER / "llama3_rope.npz"))


def test_agrees_with_the_config_in_the_spelling_of_transformers_4(tmp_path: Path):
    for file in (FOLDER / "llama3_rope").iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "config_v4.json").rename(tmp_path / "config.json")
    old, new = (fk.load_model(folder, dtype="float32") for folder in (tmp_path, FOLDER / "llama3_rope"))
    assert old.config == new.config  # so it shares the compilations of the other spelling
    assert_agrees(old, arrays(FOLDER / "llama3_rope.npz"))


def test_the_recordings_are_all_here():
    assert MODELS == ["head_dim", "llama3_rope", "nemo", "qwen2", "qwen3", "tied"]
