"""A model small enough to be made in the test, with a tokenizer and a chat template of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkv_jax.checkpoint import hugging_face
from fastkv_jax.model.config import from_hugging_face
from fastkv_jax.model.llama import Llama

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder in Hugging Face's layout: 4 layers, bytes as tokens, weights from a fixed seed."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|start|>", "<|end|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": len(vocabulary), "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = Llama(from_hugging_face(config), nnx.Rngs(0))
    tensors = {}
    for name, template in hugging_face.NAMES.items():
        owner = model if hasattr(model, name) else model.layers
        if (values := getattr(owner, name, None)) is None:
            continue
        if "{}" in template:
            tensors |= {template.format(i): np.array(layer) for i, layer in enumerate(values[...])}
        else:
            tensors[template] = np.array(values[...]) * 20
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def always_says(tiny_model, tmp_path_factory) -> Callable[..., Path]:
    """A function that makes the tiny model over: it says one token at every step; its files say what they are told."""

    def make(token: int, *, config: dict | None = None, generation: dict | None = None) -> Path:
        folder = tmp_path_factory.mktemp("always") / "model"
        shutil.copytree(tiny_model, folder)
        found = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False} | (config or {})
        (folder / "config.json").write_text(json.dumps(found))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        tensors = load_file(folder / "model.safetensors")
        embedding = tensors["model.embed_tokens.weight"]
        embedding[:, 0] = 600  # of every hidden state the largest part, which only this token's row reads
        head = np.zeros_like(embedding)
        head[token, 0] = 60
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        return folder

    return make
