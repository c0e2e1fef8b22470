"""Record golden data from transformers' PyTorch models: six random tiny models, their logits and greedy tokens.

    pip install torch transformers
    python tests/golden/record_transformers.py [output folder]

The tests do not run this script; they read what it wrote: for each model a folder as `save_pretrained` makes it and
`<name>.npz` beside it. Prompts have n = 3, 65 and 301 random tokens. Arrays, for each n:

    input_ids_n [n] int32     the prompt
    logits_n    [V] float32   the last token's logits
    tokens_n    [24] int32    greedy tokens from `model.generate`, no stop token
    top2_gap_n  [] float32    smallest difference between the two largest logits over those 24 steps

and `meta`, a JSON string. Prompts are drawn until every gap exceeds 1e-3, so float32 noise cannot change a token, and
until at least eight different tokens come out, so a model stuck on one token cannot hide a mistake.
Weights are wider than a trained model's where a mistake would otherwise stay small: attention is peaked, norms are not
one, biases are not zero. Everything runs in float32 on one thread; the files are the same each time for one torch.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PROMPT_LENGTHS = (3, 65, 301)
NEW_TOKENS = 24
SMALLEST_GAP = 1e-3
DIFFERENT_TOKENS = 8
QUERY_KEY_GAIN = 2.0  # attention scores get a standard deviation of about QUERY_KEY_GAIN squared
EMBEDDING_STD = 0.3
BIAS_STD = 0.2

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
WIDE_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}  # 48 / 4 = 12, so head_dim 8 or 16 must be read
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # wavelengths 6 (kept), 18 and 50 (in the ramp), 140 and longer (stretched)
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Recipe(NamedTuple):
    """One model: its seed, its classes, what differs from `SIZES`, and the largest size of a saved shard."""

    seed: int
    config: type
    model: type
    changes: dict[str, Any]
    shard: str = "1GB"


RECIPES = {
    "llama3_rope": Recipe(
        1, LlamaConfig, LlamaForCausalLM, {"num_attention_heads": 4, "rope_parameters": LLAMA3_ROPE}, "48KB"
    ),
    "tied": Recipe(2, LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "head_dim": Recipe(3, LlamaConfig, LlamaForCausalLM, {**WIDE_HEADS, "head_dim": 8}),
    "nemo": Recipe(
        4,
        MistralConfig,
        MistralForCausalLM,
        {
            **WIDE_HEADS,
            "head_dim": 8,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "40KB",
    ),
    "qwen2": Recipe(5, Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": Recipe(6, Qwen3Config, Qwen3ForCausalLM, {**WIDE_HEADS, "head_dim": 16, "tie_word_embeddings": True}),
}


def build(recipe: Recipe) -> PreTrainedModel:
    """A model of this recipe with random float32 weights."""
    torch.manual_seed(recipe.seed)
    model = recipe.model(recipe.config(**{**SIZES, **recipe.changes})).float().eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(widen(name, noise))
    return model


def widen(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Standard normal noise, scaled and shifted for the parameter of this name."""
    if name.endswith("bias"):
        return BIAS_STD * noise
    if "q_norm" in name or "k_norm" in name:
        return QUERY_KEY_GAIN * (1 + 0.1 * noise)
    if "norm" in name:
        return 1 + 0.1 * noise
    if "embed_tokens" in name or "lm_head" in name:
        return EMBEDDING_STD * noise
    gain = QUERY_KEY_GAIN if "q_proj" in name or "k_proj" in name else 1.0
    return gain / math.sqrt(noise.shape[1]) * noise


def greedy(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[np.ndarray, float]:
    """Greedy tokens after `prompt` [n], and the smallest gap between the two largest logits of a step."""
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(out.logits)[:, 0].topk(2).values
    return out.sequences[0, len(prompt) :].numpy().astype(np.int32), float((top[:, 0] - top[:, 1]).min())


def record(model: PreTrainedModel, seed: int) -> tuple[dict[str, np.ndarray], dict[int, int]]:
    """The arrays of one model, and the seed of each prompt (by its length)."""
    arrays, seeds = {}, {}
    for n in PROMPT_LENGTHS:
        for prompt_seed in range(1000 * seed, 1000 * (seed + 1)):
            generator = torch.Generator().manual_seed(prompt_seed)
            prompt = torch.randint(model.config.vocab_size, (n,), generator=generator)
            tokens, gap = greedy(model, prompt)
            if gap > SMALLEST_GAP and len(set(tokens.tolist())) >= DIFFERENT_TOKENS:
                break
        else:
            raise RuntimeError(
                f"no prompt of {n} tokens gives {DIFFERENT_TOKENS} tokens with gaps above {SMALLEST_GAP}"
            )
        with torch.no_grad():
            logits = model(prompt[None]).logits[0, -1]
        seeds[n] = prompt_seed
        arrays[f"input_ids_{n}"] = prompt.numpy().astype(np.int32)
        arrays[f"logits_{n}"] = logits.numpy()
        arrays[f"tokens_{n}"] = tokens
        arrays[f"top2_gap_{n}"] = np.float32(gap)
    return arrays, seeds


def write_version_4_config(folder: Path) -> None:
    """Write config_v4.json: config.json as transformers 4 spells it (rope_theta and rope_scaling, torch_dtype)."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    del config["transformers_version"]
    (folder / "config_v4.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    reread = LlamaConfig.from_json_file(folder / "config_v4.json")
    if reread.rope_parameters != LlamaConfig.from_pretrained(folder).rope_parameters:
        raise RuntimeError(f"transformers reads {reread.rope_parameters} from config_v4.json")


def main(output: Path) -> None:
    """Write every model and its arrays below `output`."""
    torch.set_num_threads(1)
    for name, recipe in RECIPES.items():
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(recipe)
        model.save_pretrained(folder, max_shard_size=recipe.shard)
        if name == "llama3_rope":
            write_version_4_config(folder)
        arrays, seeds = record(model, recipe.seed)
        meta = {
            "name": name,
            "command": "python tests/golden/record_transformers.py",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "weight_seed": recipe.seed,
            "prompt_seeds": seeds,
            "new_tokens": NEW_TOKENS,
        }
        np.savez_compressed(output / f"{name}.npz", meta=np.array(json.dumps(meta)), **arrays)
        gaps = {n: round(float(arrays[f"top2_gap_{n}"]), 4) for n in PROMPT_LENGTHS}
        print(f"{name}: {model.num_parameters()} parameters, smallest gaps {gaps}, seeds {seeds}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "transformers")
