"""What the numeric tests share: a small checkpoint, one ragged batch, and example settings of every method."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import fastkv_jax as fk
from fastkv_jax.inference import Prefill
from fastkv_jax.methods.base import Method
from fastkv_jax.model import Llama

GOLDEN = Path(__file__).parent / "golden"
MODEL_A = GOLDEN / "reference" / "models" / "A"

# One tuple for each name in METHODS. All settings differ where they can, so that swapped ones show.
EXAMPLES: dict[str, tuple[Method, ...]] = {
    "full": (fk.FullKV(),),
    "fastkv": (
        fk.FastKV(tsp_layer=1, tsp_rate=0.4, retention_rate=0.3, window_size=8, kernel_size=7, pooling="avg"),
        fk.FastKV(tsp_layer=2, tsp_length=90, capacity=30, window_size=6, kernel_size=5, pooling="max"),
        fk.FastKV(tsp_layer=0, tsp_length=70, retention_rate=0.35, window_size=4, kernel_size=3, pooling="avg"),
    ),
}
METHODS = [method for examples in EXAMPLES.values() for method in examples]
METHOD_IDS = [f"{name}-{i}" for name, examples in EXAMPLES.items() for i in range(len(examples))]

LENGTHS = (1, 7, 9, 80, 131, 255)
TAILS = (0, 3, 5, 6, 2, 4)  # a template's tail after each of these prompts
BUCKET = 256
PROMPTS = [np.random.default_rng(n).integers(0, 128, n) for n in LENGTHS]
NEW = 8  # max_new_tokens


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return dict(data)


@cache
def model_a() -> Llama:
    return fk.load_model(MODEL_A, dtype="float32")


@cache
def weights_a() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The same checkpoint for the oracle."""
    return load_file(MODEL_A / "model.safetensors"), json.loads((MODEL_A / "config.json").read_text())


def oracle_settings(method: Method) -> Any:
    """A method as the oracle takes it: the names of its settings are the same."""
    return "full" if isinstance(method, fk.FullKV) else dataclasses.asdict(method)


@cache
def ragged(method: Method, tails: tuple[int, ...] | int = 0) -> Prefill:
    """Prefill of all PROMPTS as one batch. Read-only: decoding it would donate the cache."""
    tokens, start = fk.pad_batch(PROMPTS, BUCKET)
    return fk.prefill(model_a(), tokens, start, method=method, max_new_tokens=NEW, window_end=np.asarray(tails))


def filled(positions: Any) -> np.ndarray:
    """[N, C] positions without the empty slots, which come first and are as many in every head."""
    positions = np.asarray(positions)
    empty = positions < 0
    count = int(empty[0].sum())
    assert (empty == (np.arange(positions.shape[1]) < count)).all(), positions
    return positions[:, count:]
