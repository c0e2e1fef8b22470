"""The same model in transformers on PyTorch, to be timed beside ours. Needs torch, which this project does not."""

import time
from typing import Any

import jax
import numpy as np

from fastkv_jax.benchmarks.timing import Timing
from fastkv_jax.checkpoint import hugging_face
from fastkv_jax.decoding.loop import CHUNK
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.model.config import Llama3Scaling, LlamaConfig
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.sharding import parameter_name


class Competitor:
    """transformers' Llama with our weights, dtype and device: sdpa attention, its own dynamic cache."""

    def __init__(self, model: Llama):
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise FastKVConfigError("--peer transformers needs PyTorch: pip install torch") from error
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

        c = model.config
        if c.qk_norm or c.qkv_bias != c.output_bias or isinstance(c.rope.scaling, tuple):
            raise FastKVConfigError("--peer transformers is written for Llama's own layers")
        weights = model.norm[...]
        self._torch, self._device = torch, "cpu" if next(iter(weights.devices())).platform == "cpu" else "cuda"
        if self._device == "cuda" and not torch.cuda.is_available():
            raise FastKVConfigError("--peer transformers: this PyTorch sees no GPU")
        dtype = getattr(torch, weights.dtype.name)
        config = TheirConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
            tie_word_embeddings=c.tie_word_embeddings, attention_bias=c.output_bias, rope_parameters=_rope(c),
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        with torch.device(self._device):
            self._model = LlamaForCausalLM(config).to(dtype).eval()
        missing, unexpected = self._model.load_state_dict(_state(model, torch, dtype), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise FastKVConfigError(f"transformers' Llama differs: missing {missing}, unexpected {unexpected}")

    def time(self, prompts: np.ndarray, new_tokens: int) -> Timing:
        """A run of theirs, greedy; the first steps do not count as decoding, as for ours."""
        torch = self._torch
        with torch.inference_mode():
            began = time.perf_counter()
            given = torch.from_numpy(prompts).long().to(self._device)
            out = self._model(given, use_cache=True, logits_to_keep=1)
            self._wait()
            prefill = time.perf_counter() - began
            logits = out.logits[:, -1].float().cpu().numpy()
            decode_began = 0.0
            for made in range(1, new_tokens):
                if made == CHUNK + 1:
                    self._wait()
                    decode_began = time.perf_counter()
                token = out.logits[:, -1:].argmax(-1)
                out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
            out.logits.cpu()
            ended = time.perf_counter()
        return Timing(prefill, (ended - decode_began) / (new_tokens - CHUNK - 1), ended - began, logits)

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()


def _rope(c: LlamaConfig) -> dict[str, Any]:
    scaling = c.rope.scaling
    if not isinstance(scaling, Llama3Scaling):
        return {"rope_type": "default", "rope_theta": c.rope.theta}
    return {
        "rope_type": "llama3", "rope_theta": c.rope.theta, "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }  # fmt: skip


def _state(model: Llama, torch: Any, dtype: Any) -> dict[str, Any]:
    """Our parameters under the Hub's names."""
    state = {}
    for path, values in jax.tree_util.tree_leaves_with_path(model):
        name = parameter_name(path)
        stacked = "{}" in hugging_face.NAMES[name]
        for layer, array in enumerate(values) if stacked else ((None, values),):
            tensor = torch.from_numpy(np.array(array, np.float32)).to(dtype)
            state[hugging_face.tensor_name(name, layer)] = tensor
    return state
