"""Tiny models and writers of every format, so that no binary fixture is needed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from fastkv_jax.checkpoint import hugging_face
from fastkv_jax.checkpoint.gguf import weights as our_gguf
from fastkv_jax.model import sharding
from fastkv_jax.model.config import LlamaConfig, RopeConfig
from fastkv_jax.model.llama import Llama


def tiny_config(**changes: Any) -> LlamaConfig:
    numbers: dict[str, Any] = dict(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
        rms_norm_eps=1e-5, rope=RopeConfig(10000.0, None), max_position_embeddings=256, tie_word_embeddings=False,
        qkv_bias=False, output_bias=False, qk_norm=False, sliding_window=None, stop_tokens=(2,), pad_token=None,
    )  # fmt: skip
    return LlamaConfig(**(numbers | changes))


def tiny_model(**changes: Any) -> Llama:
    """Every parameter random, so that swapped tensors show."""
    model = Llama(tiny_config(**changes), nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    fresh = [jax.random.normal(k, leaf.shape, jnp.float32) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, fresh)


def named_tensors(model: Llama, label: Callable[[str, int | None], str]) -> dict[str, np.ndarray]:
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        name, values = sharding.parameter_name(path), np.asarray(leaf)
        if path[0].name == "layers":
            tensors |= {label(name, i): np.ascontiguousarray(values[i]) for i in range(len(values))}
        else:
            tensors[label(name, None)] = values
    return tensors


def config_json(config: LlamaConfig, architecture: str = "LlamaForCausalLM") -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.output_bias,
        "vocab_size": config.vocab_size,
        "eos_token_id": list(config.stop_tokens),
    }


def write_hugging_face(
    folder: Path, model: Llama, *, shards: int = 1, architecture: str = "LlamaForCausalLM", **extra: np.ndarray
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model.config, architecture)))
    tensors = named_tensors(model, hugging_face.tensor_name) | extra
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's conversion of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    path: Path,
    model: Llama,
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    c, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_eos_token_id(c.stop_tokens[0])
    change(writer)
    for name, values in named_tensors(model, our_gguf.tensor_name).items():
        for part, heads in (("attn_q.", c.num_heads), ("attn_k.", c.num_kv_heads)):
            values = interleave(values, heads) if part in name and architecture == "llama" else values
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(found: Llama, wanted: Llama, atol: float = 0.0) -> None:
    assert found.config == wanted.config
    a, b = (jax.tree_util.tree_flatten_with_path(m)[0] for m in (found, wanted))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=atol, err_msg=str(path))


@pytest.fixture
def tiny() -> Any:
    """The helpers above as one namespace, for the test files of this folder."""
    import types

    return types.SimpleNamespace(
        config=tiny_config,
        model=tiny_model,
        write_hugging_face=write_hugging_face,
        write_gguf=write_gguf,
        config_json=config_json,
        assert_same=assert_same,
    )
