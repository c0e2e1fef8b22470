"""FastKV in JAX: long prompts through Llama-family models, on TPU and GPU.

Letters in shapes: B batch, T prompt columns, S columns after propagation, L layers, H query heads, K KV heads,
G = H/K, N cache heads (K, or H where a published method caches per query head), D head dim, E hidden, F MLP,
V vocabulary, C capacity, M new tokens, W window. Arrays are laid out [B, heads, tokens, D].
"""

from etils import epy

# Imported when first asked for: help texts and errors of the command line must not wait for all of them.
with epy.lazy_api_imports(globals()):
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
