"""A model folder as Hugging Face writes it: config.json and safetensors, checked as a whole before a weight is read."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fastkv_jax.checkpoint.assemble import assemble, check_finite, listed
from fastkv_jax.checkpoint.check import check_tensors
from fastkv_jax.checkpoint.safetensors_files import Tensor, find_tensors, open_tensors, parse_json
from fastkv_jax.config import LlamaConfig, from_hugging_face
from fastkv_jax.errors import CheckpointError
from fastkv_jax.model import Llama

# The attributes of model.py and the names on the Hub; linear weights are [out, in] in both.
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "wq": "model.layers.{}.self_attn.q_proj.weight",
    "wk": "model.layers.{}.self_attn.k_proj.weight",
    "wv": "model.layers.{}.self_attn.v_proj.weight",
    "wo": "model.layers.{}.self_attn.o_proj.weight",
    "bq": "model.layers.{}.self_attn.q_proj.bias",
    "bk": "model.layers.{}.self_attn.k_proj.bias",
    "bv": "model.layers.{}.self_attn.v_proj.bias",
    "bo": "model.layers.{}.self_attn.o_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "w_up": "model.layers.{}.mlp.up_proj.weight",
    "w_down": "model.layers.{}.mlp.down_proj.weight",
}
DTYPES = ("F32", "F16", "BF16")
_QUANTISED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class _Checkpoint:
    config: LlamaConfig
    tensors: dict[str, Tensor]


def tensor_name(name: str, layer: int | None) -> str:
    """The Hub's name of one of our parameters."""
    return NAMES[name].format(layer)


def inspect(folder: Path) -> LlamaConfig:
    """Read the config and check every tensor's name, dtype and shape. Reads no weights."""
    return _check(folder).config


def load(
    folder: Path, dtype: Any, mesh: Mesh | None = None, *, check_weights: bool = False, progress: bool = False
) -> Llama:
    """The model in `dtype`. Raises `CheckpointError` before any weight is read if the folder is not consistent."""
    checkpoint = _check(folder)
    with ExitStack() as stack:
        read = open_tensors(checkpoint.tensors.values(), stack)

        def read_parameter(name: str, layer: int | None) -> np.ndarray:
            key = tensor_name(name, layer)
            return read(checkpoint.tensors[key], key)

        model = assemble(checkpoint.config, read_parameter, dtype, mesh, progress, tensor_name)
    if check_weights:
        check_finite(model, str(folder), tensor_name)
    return model


def _check(folder: Path) -> _Checkpoint:
    config = from_hugging_face(
        _read_json(folder / "config.json"),
        _read_json(folder / "generation_config.json", missing_ok=True),
        source=str(folder / "config.json"),
    )
    tensors = find_tensors(folder)
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignored.add(NAMES["lm_head"])
    _check_dtypes({name: tensor for name, tensor in tensors.items() if name not in ignored}, folder)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(config, shapes, tensor_name, ignored, str(folder))
    return _Checkpoint(config, tensors)


def _check_dtypes(tensors: dict[str, Tensor], folder: Path) -> None:
    if packed := [name for name in tensors if name.endswith(_QUANTISED)]:
        raise CheckpointError(
            f"{folder}: quantised tensors (GPTQ, AWQ or FP8) are not supported: {listed(packed)};"
            " use an unquantised checkpoint"
        )
    if odd := [f"{name} has dtype {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        raise CheckpointError(
            f"{folder}: unsupported dtypes: {listed(odd)}; supported: {', '.join(DTYPES)};"
            " use an unquantised checkpoint"
        )


def _read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        return parse_json(file.read_bytes(), file)
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
