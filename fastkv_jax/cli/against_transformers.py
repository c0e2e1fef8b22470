"""The same model in transformers on PyTorch, to be timed beside ours. Needs torch, which this project does not."""

import time
from typing import Any

import jax
import numpy as np

from fastkv_jax.checkpoint import hugging_face
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.model import Llama
from fastkv_jax.sharding import parameter_name


class Competitor:
    """transformers' Llama with our weights: float32, sdpa attention, its own dynamic cache."""

    def __init__(self, model: Llama):
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise FastKVConfigError("--against transformers needs PyTorch: pip install torch") from error
        from transformers import LlamaConfig, LlamaForCausalLM

        c = model.config
        if c.qk_norm or c.qkv_bias != c.output_bias or c.rope.scaling is not None:
            raise FastKVConfigError("--against transformers is written for Llama with default rotary embedding")
        config = LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
            tie_word_embeddings=c.tie_word_embeddings, attention_bias=c.output_bias,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta}
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self._torch = torch
        self._model = LlamaForCausalLM(config).eval()
        missing, unexpected = self._model.load_state_dict(_state(model, torch), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise FastKVConfigError(f"transformers' Llama differs: missing {missing}, unexpected {unexpected}")

    def time(self, prompt: np.ndarray, new_tokens: int) -> tuple[float, float, np.ndarray]:
        """(seconds of prefill, seconds per decoded token, last-token logits), greedy."""
        torch = self._torch
        with torch.inference_mode():
            began = time.perf_counter()
            out = self._model(torch.from_numpy(prompt).long(), use_cache=True, logits_to_keep=1)
            prefill = time.perf_counter() - began
            logits = out.logits[0, -1].numpy()
            out = self._step(out)  # the first step is left out, as for ours
            began = time.perf_counter()
            for _ in range(new_tokens):
                out = self._step(out)
            return prefill, (time.perf_counter() - began) / new_tokens, logits

    def _step(self, out: Any) -> Any:
        token = out.logits[:, -1:].argmax(-1)
        return self._model(token, past_key_values=out.past_key_values, use_cache=True)


def _state(model: Llama, torch: Any) -> dict[str, Any]:
    """Our parameters under the Hub's names."""
    state = {}
    for path, values in jax.tree_util.tree_leaves_with_path(model):
        name = parameter_name(path)
        stacked = "{}" in hugging_face.NAMES[name]
        for layer, array in enumerate(values) if stacked else ((None, values),):
            tensor = torch.from_numpy(np.array(array, np.float32))
            state[hugging_face.tensor_name(name, layer)] = tensor
    return state
