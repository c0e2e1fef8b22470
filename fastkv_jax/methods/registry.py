"""Which class a name of `NAMES` is."""

from fastkv_jax.methods.adakv import AdaKV
from fastkv_jax.methods.asl import ASL
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
from fastkv_jax.methods.snapkv import SnapKV
from fastkv_jax.methods.streamingllm import StreamingLLM
from fastkv_jax.methods.tova import TOVA

METHODS: dict[str, type] = {
    "full": FullKV,
    "fastkv": FastKV,
    "streamingllm": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "gemfilter": GemFilter,
    "pyramidinfer": PyramidInfer,
    "adakv": AdaKV,
    "pyramidkv": PyramidKV,
    "claa": CLAA,
    "asl": ASL,
    "keydiff": KeyDiff,
    "knorm": Knorm,
    "tova": TOVA,
    "expectedattention": ExpectedAttention,
    "criticalkv": CriticalKV,
}
