"""A model folder as Hugging Face writes it: config.json and safetensors, checked as a whole before a weight is read."""

import dataclasses
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fastkv_jax.checkpoint.assemble import assemble, check_finite, listed
from fastkv_jax.checkpoint.check import check_tensors
from fastkv_jax.checkpoint.other_weights import doubt_others
from fastkv_jax.checkpoint.safetensors_files import Tensor, find_tensors, open_tensors, parse_json
from fastkv_jax.checkpoint.tokenizers.end_tokens import Claim
from fastkv_jax.errors import CheckpointError, ModelWarning
from fastkv_jax.model.config import LlamaConfig, from_hugging_face, token_ids
from fastkv_jax.model.llama import Llama

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
_ROWS = 4096  # of a table compared at once
DTYPES = ("F32", "F16", "BF16")
_QUANTISED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv")


def tensor_name(name: str, layer: int | None) -> str:
    """The Hub's name of one of our parameters."""
    return NAMES[name].format(layer)


def inspect(folder: Path) -> LlamaConfig:
    """Read the config and check every tensor's name, dtype and shape. Reads no weights."""
    config = from_hugging_face(
        _read_json(folder / "config.json"),
        _read_json(folder / "generation_config.json", missing_ok=True),
        source=str(folder / "config.json"),
    )
    tensors = find_tensors(folder)
    doubt_others(folder, tensors)
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and NAMES["lm_head"] in tensors:
        config, dropped = _believe_the_head(folder, config, tensors)
        ignored |= dropped
    _check_dtypes({name: tensor for name, tensor in tensors.items() if name not in ignored}, folder)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(config, shapes, tensor_name, ignored, str(folder))
    return config


def declared_ends(folder: Path) -> list[Claim]:
    """The end tokens that its configuration files name."""
    files = [(name, _read_json(folder / name, missing_ok=True)) for name in ("generation_config.json", "config.json")]
    return [(name, token_ids(content, "eos_token_id", str(folder / name))) for name, content in files]


def load(
    folder: Path, config: LlamaConfig, dtype: Any, mesh: Mesh | None, *, check_weights: bool, progress: bool
) -> Llama:
    """The model in `dtype`, of a folder that `inspect` has found consistent."""
    tensors = find_tensors(folder)
    with ExitStack() as stack:
        read = open_tensors(tensors.values(), stack)

        def read_parameter(name: str, layer: int | None) -> np.ndarray:
            key = tensor_name(name, layer)
            return read(tensors[key], key)

        model = assemble(config, read_parameter, dtype, mesh, progress, tensor_name)
    if check_weights:
        check_finite(model, str(folder), tensor_name)
    return model


def _believe_the_head(folder: Path, config: LlamaConfig, tensors: dict[str, Tensor]) -> tuple[LlamaConfig, set[str]]:
    """A head beside tied embeddings: a copy of them is not needed, another one is what the model was trained with."""
    table, head = NAMES["embedding"], NAMES["lm_head"]
    if table not in tensors or _same_values(tensors[table], table, tensors[head], head):
        return config, {head}
    warnings.warn(
        f"{folder}: config.json says tie_word_embeddings, but {head} differs from {table}; the file's {head} is used",
        ModelWarning,
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False), set()


def _same_values(first: Tensor, first_name: str, second: Tensor, second_name: str) -> bool:
    if first.shape != second.shape or {first.dtype, second.dtype} - set(DTYPES):
        return False
    with ExitStack() as stack:
        read = open_tensors((first, second), stack)
        one, other = read(first, first_name), read(second, second_name)
        rows = [slice(at, at + _ROWS) for at in range(0, len(one), _ROWS)]
        return all(
            np.array_equal(one[some].astype(np.float32), other[some].astype(np.float32), equal_nan=True)
            for some in rows
        )


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
