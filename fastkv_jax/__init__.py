"""FastKV in JAX: long prompts through Llama-family models, on TPU and GPU.

Letters in shapes: B batch, T prompt columns, S columns after propagation, L layers, H query heads, K KV heads,
G = H/K, N cache heads (K, or H where a published method caches per query head), D head dim, E hidden, F MLP,
V vocabulary, C capacity, M new tokens, W window. Arrays are laid out [B, heads, tokens, D].
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkv_jax.buckets import pad_batch
    from fastkv_jax.cache.on_disk import load_cache, save_cache
    from fastkv_jax.calibration.measuring import calibrate
    from fastkv_jax.checkpoint import load_model
    from fastkv_jax.decoding.loop import generate
    from fastkv_jax.decoding.sampling import Greedy, Sample
    from fastkv_jax.decoding.step import decode_step
    from fastkv_jax.decoding.streaming import stream
    from fastkv_jax.errors import BackendError, CheckpointError, FastKVConfigError, InputError
    from fastkv_jax.explanation.explanation import explain
    from fastkv_jax.methods import (
        ASL,
        CLAA,
        H2O,
        METHODS,
        TOVA,
        AdaKV,
        CriticalKV,
        ExpectedAttention,
        FastKV,
        FullKV,
        GemFilter,
        KeyDiff,
        Knorm,
        PyramidInfer,
        PyramidKV,
        SnapKV,
        StreamingLLM,
    )
    from fastkv_jax.model.config import LlamaConfig
    from fastkv_jax.prefilling.doors import prefill
    from fastkv_jax.text import load_tokenizer

__version__ = "0.1.0"

# Imported when first asked for: help texts and errors of the command line must not wait for all of them.
_HOMES = {
    "buckets": "pad_batch",
    "cache.on_disk": "load_cache save_cache",
    "calibration.measuring": "calibrate",
    "checkpoint": "load_model",
    "model.config": "LlamaConfig",
    "errors": "BackendError CheckpointError FastKVConfigError InputError",
    "explanation.explanation": "explain",
    "decoding.loop": "generate",
    "decoding.step": "decode_step",
    "prefilling.doors": "prefill",
    "methods": "ASL CLAA H2O METHODS TOVA AdaKV CriticalKV ExpectedAttention FastKV FullKV GemFilter KeyDiff Knorm "
    "PyramidInfer PyramidKV SnapKV StreamingLLM",
    "decoding.sampling": "Greedy Sample",
    "decoding.streaming": "stream",
    "text": "load_tokenizer",
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(f"fastkv_jax.{home}"), name)
            return value
    raise AttributeError(f"module 'fastkv_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


__all__ = [
    "ASL",
    "CLAA",
    "H2O",
    "METHODS",
    "TOVA",
    "AdaKV",
    "BackendError",
    "CheckpointError",
    "CriticalKV",
    "ExpectedAttention",
    "FastKV",
    "FastKVConfigError",
    "FullKV",
    "GemFilter",
    "Greedy",
    "InputError",
    "KeyDiff",
    "Knorm",
    "LlamaConfig",
    "PyramidInfer",
    "PyramidKV",
    "Sample",
    "SnapKV",
    "StreamingLLM",
    "calibrate",
    "decode_step",
    "explain",
    "generate",
    "load_cache",
    "load_model",
    "load_tokenizer",
    "pad_batch",
    "prefill",
    "save_cache",
    "stream",
]
