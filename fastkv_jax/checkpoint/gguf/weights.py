"""A model in llama.cpp's GGUF format: its metadata as a `LlamaConfig`, its tensors dequantised layer by layer."""

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fastkv_jax.checkpoint.assemble import aligned_empty, assemble, cast, check_finite
from fastkv_jax.checkpoint.check import check_tensors
from fastkv_jax.checkpoint.gguf.file import GGUFFile, open_gguf
from fastkv_jax.checkpoint.tokenizers.end_tokens import Claim, Vocabulary
from fastkv_jax.checkpoint.tokenizers.special_tokens import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, looks_special
from fastkv_jax.errors import CheckpointError
from fastkv_jax.model.config import LlamaConfig, RopeConfig
from fastkv_jax.model.llama import Llama

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAMES = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "wq": "blk.{}.attn_q.weight",
    "wk": "blk.{}.attn_k.weight",
    "wv": "blk.{}.attn_v.weight",
    "wo": "blk.{}.attn_output.weight",
    "bq": "blk.{}.attn_q.bias",
    "bk": "blk.{}.attn_k.bias",
    "bv": "blk.{}.attn_v.bias",
    "bo": "blk.{}.attn_output.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "w_gate": "blk.{}.ffn_gate.weight",
    "w_up": "blk.{}.ffn_up.weight",
    "w_down": "blk.{}.ffn_down.weight",
}
ROPE_DIVISORS = "rope_freqs.weight"
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_CHUNK = 1 << 22  # elements dequantised at a time: bounds the float32 copy of a large embedding


def tensor_name(name: str, layer: int | None) -> str:
    """GGUF's name of one of our parameters."""
    return NAMES[name].format(layer)


def inspect(path: Path) -> LlamaConfig:
    """Read the config and check every tensor's name, type and shape. Reads no weights."""
    return _check(open_gguf(path))


def declared_ends(path: Path) -> list[Claim]:
    """The end tokens that its keys name."""
    return [("the file's keys", _token_ids(open_gguf(path), _STOP_KEYS))]


def vocabulary(path: Path) -> Vocabulary:
    """Its special tokens, whatever type the file gives them, and its chat template."""
    metadata = open_gguf(path).metadata
    tokens, template = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.chat_template")
    if not isinstance(tokens, list):
        return Vocabulary()
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
    roles = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in keys.items()}
    names = {role: tokens[i] for role, i in roles.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    special = {
        text: i
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) or looks_special(text) or text in names.values()
    }
    return Vocabulary(special, names, template if isinstance(template, str) else None)


def load(
    path: Path, config: LlamaConfig, dtype: Any, mesh: Mesh | None, *, check_weights: bool, progress: bool
) -> Llama:
    """The model, dequantised to `dtype`. Only float32 holds the dequantised values exactly."""
    file = open_gguf(path)
    # llama.cpp's converter interleaves the two halves of each rotary pair for this architecture only.
    interleaved = {"wq": config.num_heads, "bq": config.num_heads, "wk": config.num_kv_heads, "bk": config.num_kv_heads}
    if file.metadata["general.architecture"] != "llama":
        interleaved = {}

    def read(name: str, layer: int | None) -> np.ndarray:
        values = _dequantise(file, tensor_name(name, layer), dtype)
        return _deinterleave(values, interleaved[name]) if name in interleaved else values

    model = assemble(config, read, dtype, mesh, progress, tensor_name)
    if check_weights:
        check_finite(model, str(path), tensor_name)
    return model


def _dequantise(file: GGUFFile, name: str, dtype: Any) -> np.ndarray:
    tensor = file.tensors[name]
    width = tensor.shape[-1]
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    step = max(1, _CHUNK // width)
    if rows <= step:
        return cast(file.rows(tensor, 0, rows), dtype, name).reshape(tensor.shape)
    values = aligned_empty((rows, width), dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        values[first:last] = cast(file.rows(tensor, first, last), values.dtype, name)
    return values.reshape(tensor.shape)


def _deinterleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (0, D/2, 1, D/2 + 1, ...) back to (0, 1, ..., D - 1)."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _check(file: GGUFFile) -> LlamaConfig:
    config = _config(file)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    check_tensors(config, shapes, tensor_name, {ROPE_DIVISORS}, str(file.path))
    return config


def _config(file: GGUFFile) -> LlamaConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: unsupported architecture {architecture!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    meta = _Metadata(file, architecture)
    if experts := meta.optional("expert_count"):
        raise CheckpointError(f"{file.path}: {architecture}.expert_count is {experts}; mixtures are not supported")
    heads, hidden = meta.integer("attention.head_count"), meta.integer("embedding_length")
    kv_heads = meta.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{file.path}: head_count ({heads}) is not a multiple of head_count_kv ({kv_heads})")
    head_dim = _head_dim(meta, hidden, heads)
    embedding = file.tensors.get(NAMES["embedding"])
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor {NAMES['embedding']} is missing")
    has = file.tensors.__contains__
    return LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=meta.integer("feed_forward_length"),
        num_layers=meta.integer("block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(meta, head_dim),
        max_position_embeddings=meta.integer("context_length"),
        tie_word_embeddings=not has(NAMES["lm_head"]),
        qkv_bias=has(tensor_name("bq", 0)),
        output_bias=has(tensor_name("bo", 0)),
        qk_norm=has(tensor_name("q_norm", 0)),
        sliding_window=meta.integer("attention.sliding_window") if meta.optional("attention.sliding_window") else None,
        stop_tokens=_token_ids(file, _STOP_KEYS),
        pad_token=next((i for i in _token_ids(file, ("padding_token_id",)) if 0 <= i < embedding.shape[0]), None),
    )


def _head_dim(meta: "_Metadata", hidden: int, heads: int) -> int:
    size = meta.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := meta.integer(key, size)) != size:
            raise CheckpointError(f"{meta.file.path}: {key} is {other}, heads have {size} dimensions; they must agree")
    if size % 2:
        raise CheckpointError(f"{meta.file.path}: attention.key_length ({size}) must be even for rotary embedding")
    return size


def _rope(meta: "_Metadata", head_dim: int) -> RopeConfig:
    _check_scaling(meta)
    theta = meta.number("rope.freq_base", 10000.0)
    tensor = meta.file.tensors.get(ROPE_DIVISORS)
    if tensor is None:
        return RopeConfig(theta, None)
    if tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{meta.file.path}: {ROPE_DIVISORS} is {list(tensor.shape)}, expected [{head_dim // 2}]")
    divisors = tuple(meta.file.rows(tensor, 0, 1).ravel().tolist())
    if not all(0 < value < float("inf") for value in divisors):
        raise CheckpointError(f"{meta.file.path}: {ROPE_DIVISORS} must hold positive numbers")
    return RopeConfig(theta, divisors)


def _check_scaling(meta: "_Metadata") -> None:
    """Only positions as they are; without a type a factor is that of linear scaling, as in llama.cpp."""
    kind, path = meta.optional("rope.scaling.type"), meta.file.path
    if kind not in (None, "none", "linear"):
        raise CheckpointError(f"{path}: unsupported rope.scaling.type {kind!r}; supported: 'none'")
    for key in ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"):
        factor = meta.optional(key)
        if factor is not None and (type(factor) not in (int, float) or factor not in (0, 1)):  # 0 is none, too
            beside = "" if kind is None else f" beside rope.scaling.type {kind!r}"
            raise CheckpointError(f"{path}: unsupported {key} {factor!r}{beside}; supported: 1, positions as they are")


def _token_ids(file: GGUFFile, keys: tuple[str, ...]) -> tuple[int, ...]:
    found = [file.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(value for value in found if isinstance(value, int)))


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture

    def optional(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise self._wrong(key, "a positive integer (the same for all layers)", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.optional(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, "a positive number", value)
        return float(str(np.float32(value)))  # stored as float32: 1e-5, not 9.999999747378752e-06

    def _wrong(self, key: str, wanted: str, value: Any) -> CheckpointError:
        found = "nothing" if value is None else repr(value)[:80]
        return CheckpointError(f"{self.file.path}: {self.architecture}.{key} must be {wanted}, found {found}")
