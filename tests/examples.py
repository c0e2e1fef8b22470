"""What the numeric tests share: a small checkpoint, one ragged batch, and example settings of every method."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

import fastkv_jax as fk
from fastkv_jax.cache.kv_cache import KVCache, LayerKV
from fastkv_jax.decoding.loop import Generated
from fastkv_jax.methods.base import Method
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.doors import Prefill

GOLDEN = Path(__file__).parent / "golden"
MODEL_A = GOLDEN / "reference" / "models" / "A"

# One tuple for each name in METHODS, compositions under the name of the whole. Settings differ where they can, so that
# swapped ones show.
EXAMPLES: dict[str, tuple[Method, ...]] = {
    "full": (fk.FullKV(),),
    "fastkv": (
        fk.FastKV(tsp_layer=1, tsp_rate=0.4, retention_rate=0.3, window_size=8, kernel_size=7, pooling="avg"),
        fk.FastKV(tsp_layer=2, tsp_length=90, capacity=30, window_size=6, kernel_size=5, pooling="max"),
        fk.FastKV(tsp_layer=0, tsp_length=70, retention_rate=0.35, window_size=4, kernel_size=3, pooling="avg"),
        fk.FastKV(tsp_layers=(0, 2), tsp_rate=(0.7, 0.3), compression=fk.KeyDiff(retention_rate=0.4)),
        fk.FastKV(tsp_layer=1, tsp_rate=0.5, compression=fk.AdaKV(retention_rate=0.2, window_size=4)),
        fk.FastKV(tsp_layer=2, tsp_length=60, capacity=50, selection=fk.CLAA(tsp_layer=0, score_layers=3)),
        fk.FastKV(
            tsp_layer=1, tsp_rate=0.3, selection=fk.GemFilter(filter_layer=0), compression=fk.PyramidKV(capacity=40)
        ),
    ),
    "streamingllm": (fk.StreamingLLM(retention_rate=0.3, sinks=3), fk.StreamingLLM(capacity=20)),
    "h2o": (fk.H2O(retention_rate=0.25, window_size=6),),
    "snapkv": (
        fk.SnapKV(retention_rate=0.3, window_size=5, kernel_size=3, pooling="avg"),
        fk.SnapKV.reference(capacity=40, window_size=6, kernel_size=5),
    ),
    "gemfilter": (fk.GemFilter(filter_layer=1, retention_rate=0.3, window_size=5),),
    "pyramidinfer": (fk.PyramidInfer(recent_ratio=0.1, decay_ratio=0.3, min_context=10),),
    "adakv": (fk.AdaKV(retention_rate=0.3, window_size=5), fk.AdaKV(capacity=30, base=fk.Knorm())),
    "pyramidkv": (fk.PyramidKV(retention_rate=0.3, window_size=5, kernel_size=3, beta=4),),
    "claa": (fk.CLAA(tsp_layer=2, retention_rate=0.4, score_layers=2, full_layers=1),),
    "asl": (fk.ASL(tsp_rate=0.5, min_layer=1, score_layers=2, threshold=1.0, window_size=6),),
    "keydiff": (fk.KeyDiff(retention_rate=0.3, window_size=5),),
    "knorm": (fk.Knorm(retention_rate=0.3, window_size=5),),
    "tova": (fk.TOVA(retention_rate=0.3, window_size=5),),
    "expectedattention": (fk.ExpectedAttention(retention_rate=0.3, window_size=5, sinks=2, future=64),),
    "criticalkv": (fk.CriticalKV(retention_rate=0.3, window_size=5), fk.CriticalKV(capacity=30, base=fk.KeyDiff())),
}
METHODS = [method for examples in EXAMPLES.values() for method in examples]
METHOD_IDS = [f"{name}-{i}" for name, examples in EXAMPLES.items() for i in range(len(examples))]
IN_ORACLE = [*EXAMPLES["full"], *EXAMPLES["fastkv"][:3]]  # what oracle.py can do

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


@jax.jit
def _layers(cache: KVCache) -> list[LayerKV]:
    return [cache.layer(i) for i in range(cache.k_new.shape[0])]


def layers(cache: KVCache) -> list[LayerKV]:
    """Every `cache.layer(i)` in NumPy, by one program: cut out one by one they are dozens to compile."""
    return jax.tree.map(np.asarray, _layers(cache))


def filled(positions: Any) -> np.ndarray:
    """[N, C] positions without the empty slots, which come first and are as many in every head."""
    heads = filled_by_head(positions)
    assert len({len(head) for head in heads}) == 1
    return np.stack(heads)


def filled_by_head(positions: Any) -> list[np.ndarray]:
    """The same where heads may hold different numbers."""
    heads = []
    for head in np.asarray(positions):
        count = int((head >= 0).sum())
        assert (head[: len(head) - count] < 0).all()
        heads.append(head[len(head) - count :])
    return heads


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Of `PROMPTS`."""
    return fk.pad_batch(PROMPTS, BUCKET)


def generate(method: Method, **options: Any) -> Generated:
    """Of `PROMPTS`."""
    return fk.generate(model_a(), *batch(), method=method, **({"max_new_tokens": NEW, "stop_tokens": ()} | options))


@cache
def greedy(method: Method) -> np.ndarray:
    """The tokens of `PROMPTS`, made once."""
    return np.asarray(generate(method).tokens)
