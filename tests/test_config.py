"""config.json is read in both spellings, and what is not understood is refused by name, never guessed."""

import dataclasses
from typing import Any

import pytest

from fastkv_jax.config import ARCHITECTURES, Llama3Scaling, RopeConfig, from_hugging_face
from fastkv_jax.errors import CheckpointError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 5e5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def read(**changes: Any):
    config = {key: value for key, value in {**BASE, **changes}.items() if value is not ...}
    return from_hugging_face(config)


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("config.json: ")
    return str(caught.value)


def test_every_number_comes_from_the_file():
    config = read()
    assert (config.num_heads, config.num_kv_heads, config.group_size, config.head_dim) == (4, 2, 2, 16)
    assert config.rope == RopeConfig(5e5, None) and config.rms_norm_eps == 1e-5
    assert config.stop_tokens == () and config.pad_token is None and config.sliding_window is None


def test_no_field_of_the_config_has_a_default():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(read()))


def test_both_spellings_of_rope_scaling_are_one():
    old = read(rope_scaling={"type": "llama3", **LLAMA3})
    new = read(rope_theta=..., rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old == new and isinstance(old.rope.scaling, Llama3Scaling)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_family_has_its_biases_and_norms(architecture):
    config = read(architectures=[architecture])
    assert config.qkv_bias == (architecture == "Qwen2ForCausalLM") and not config.output_bias
    assert config.qk_norm == (architecture == "Qwen3ForCausalLM")


def test_attention_bias_of_llama_is_on_all_four_projections():
    config = read(attention_bias=True)
    assert config.qkv_bias and config.output_bias


def test_old_files_leave_out_what_has_one_meaning():
    config = read(num_key_value_heads=..., rope_theta=...)
    assert config.num_kv_heads == 4 and config.rope.theta == 10000.0 and not config.tie_word_embeddings


def test_stop_tokens_are_a_list_and_generation_config_wins():
    config = from_hugging_face({**BASE, "eos_token_id": 5}, {"eos_token_id": [7, 8], "pad_token_id": 3})
    assert config.stop_tokens == (7, 8) and config.pad_token == 3
    assert from_hugging_face({**BASE, "eos_token_id": 5}).stop_tokens == (5,)


def test_a_sliding_window_counts_only_where_layers_use_it():
    assert read(sliding_window=64).sliding_window == 64
    assert read(sliding_window=None).sliding_window is None
    assert read(sliding_window=64, layer_types=["full_attention"] * 4).sliding_window is None
    assert read(sliding_window=64, layer_types=["full_attention", "sliding_attention"] * 2).sliding_window == 64
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}
    assert read(**qwen, use_sliding_window=False).sliding_window is None
    assert read(**qwen, use_sliding_window=True, max_window_layers=2).sliding_window == 64
    assert read(**qwen, use_sliding_window=True, max_window_layers=4).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    (
        (
            {"architectures": ["Qwen3MoeForCausalLM"]},
            "unsupported architecture 'Qwen3MoeForCausalLM'; supported: Llama",
        ),
        ({"architectures": ...}, "unsupported architecture None"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unsupported rope_type 'longrope'"),
        ({"rope_scaling": {"type": "yarn"}}, "unsupported rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "field 'low_freq_factor' is missing"),
        ({"rope_scaling": {"type": "llama3"}, "rope_parameters": {}}, "rope_parameters and rope_scaling are both"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, found 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        ({"hidden_size": 66}, "head_dim is absent and hidden_size (66)"),
        ({"head_dim": 15}, "head_dim (15) must be even"),
        ({"hidden_size": ...}, "field 'hidden_size' is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, found '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, found 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, found True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, found nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, found 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them, found 'x'"),
    ),
)
def test_what_is_not_understood_is_refused_by_name(changes, complaint):
    assert complaint in refusal(**changes)
