"""The methods by the names that `--method` takes.

Imported when first asked for: flags and their help need names alone, and JAX takes its time.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from fastkv_jax.methods.adakv import AdaKV
    from fastkv_jax.methods.asl import ASL
    from fastkv_jax.methods.base import Layer, Method, Scores, Segment
    from fastkv_jax.methods.claa import CLAA
    from fastkv_jax.methods.criticalkv import CriticalKV
    from fastkv_jax.methods.expected_attention import ExpectedAttention
    from fastkv_jax.methods.fastkv import FastKV
    from fastkv_jax.methods.full import FullKV
    from fastkv_jax.methods.gemfilter import GemFilter
    from fastkv_jax.methods.h2o import H2O
    from fastkv_jax.methods.keydiff import KeyDiff
    from fastkv_jax.methods.knorm import Knorm
    from fastkv_jax.methods.pyramidinfer import PyramidInfer
    from fastkv_jax.methods.pyramidkv import PyramidKV
    from fastkv_jax.methods.registry import METHODS
    from fastkv_jax.methods.snapkv import SnapKV
    from fastkv_jax.methods.streamingllm import StreamingLLM
    from fastkv_jax.methods.tova import TOVA

NAMES = (
    "full",
    "fastkv",
    "streamingllm",
    "h2o",
    "snapkv",
    "gemfilter",
    "pyramidinfer",
    "adakv",
    "pyramidkv",
    "claa",
    "asl",
    "keydiff",
    "knorm",
    "tova",
    "expectedattention",
    "criticalkv",
)

__all__ = [
    "ASL",
    "CLAA",
    "H2O",
    "METHODS",
    "NAMES",
    "TOVA",
    "AdaKV",
    "CriticalKV",
    "ExpectedAttention",
    "FastKV",
    "FullKV",
    "GemFilter",
    "KeyDiff",
    "Knorm",
    "Layer",
    "Method",
    "PyramidInfer",
    "PyramidKV",
    "Scores",
    "Segment",
    "SnapKV",
    "StreamingLLM",
]
