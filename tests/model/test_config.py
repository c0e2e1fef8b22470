"""What config.json may say, in both spellings, and what is refused: the message names the field and its value."""

import json
from pathlib import Path

import pytest

from fastkv_jax.errors import CheckpointError
from fastkv_jax.model.config import ARCHITECTURES, Llama3Scaling, RopeConfig, from_hugging_face

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PLAIN = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}  # fmt: skip


def read(**changes):
    return from_hugging_face(PLAIN | changes)


def refused(*words, generation=None, **changes):
    with pytest.raises(CheckpointError) as error:
        from_hugging_face(PLAIN | changes, generation, source="folder/config.json")
    message = str(error.value)
    assert message.startswith("folder/config.json: ") and "\n" not in message
    for word in words:
        assert word in message
    return message


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted(GOLDEN.glob("*/config*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_files_that_transformers_wrote(file):
    written = json.loads(file.read_text())
    found = from_hugging_face(written)
    for ours, theirs in (
        ("vocab_size", "vocab_size"), ("hidden_size", "hidden_size"), ("intermediate_size", "intermediate_size"),
        ("num_layers", "num_hidden_layers"), ("num_heads", "num_attention_heads"), ("rms_norm_eps", "rms_norm_eps"),
        ("num_kv_heads", "num_key_value_heads"), ("max_position_embeddings", "max_position_embeddings"),
        ("tie_word_embeddings", "tie_word_embeddings"),
    ):  # fmt: skip
        assert getattr(found, ours) == written[theirs]
    assert found.head_dim == written.get("head_dim", written["hidden_size"] // written["num_attention_heads"])
    rope = written.get("rope_parameters", {"rope_theta": written.get("rope_theta")})
    assert found.rope.theta == rope["rope_theta"] and found.sliding_window is None
    assert found.stop_tokens == () and found.pad_token is None


def test_both_spellings_of_transformers_mean_the_same():
    old, new = (json.loads((GOLDEN / "llama3_rope" / name).read_text()) for name in ("config_v4.json", "config.json"))
    assert "rope_scaling" in old and "rope_parameters" in new
    assert from_hugging_face(old) == from_hugging_face(new)
    assert from_hugging_face(old).rope == RopeConfig(500.0, Llama3Scaling(8.0, 1.0, 4.0, 64))


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, RopeConfig(10000.0, None)),
        ({"rope_theta": 5e5}, RopeConfig(5e5, None)),
        ({"rope_scaling": None, "rope_parameters": None}, RopeConfig(10000.0, None)),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7}, RopeConfig(7.0, None)),
        ({"rope_scaling": {"factor": 1.0}}, RopeConfig(10000.0, None)),
        (
            {"rope_scaling": {"rope_type": "llama3", "type": "llama3"} | LLAMA3},
            RopeConfig(10000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ),
        ({"rope_parameters": {"rope_theta": 7, "rope_type": "default"}}, RopeConfig(7.0, None)),
        ({"rope_parameters": {"rope_theta": 7, "rope_type": "default"}, "rope_theta": 9}, RopeConfig(7.0, None)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 9}, RopeConfig(9.0, None)),
        ({"rope_scaling": {"type": "llama3"} | LLAMA3}, RopeConfig(10000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))),
        ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3}, RopeConfig(10000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))),
    ],
)
def test_spellings_of_the_rotary_embedding(changes, rope):
    assert read(**changes).rope == rope


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bias", [False, True])
def test_architectures_differ_in_biases_and_norms(architecture, bias):
    found = read(architectures=[architecture], attention_bias=bias)
    qwen2 = architecture == "Qwen2ForCausalLM"
    assert found.qkv_bias == (bias or qwen2)
    assert found.output_bias == (bias and not qwen2)
    assert found.qk_norm == (architecture == "Qwen3ForCausalLM")


def test_what_old_files_leave_out():
    old = {name: value for name, value in PLAIN.items() if name != "num_key_value_heads"}
    found = from_hugging_face(old)
    assert (found.num_kv_heads, found.group_size, found.head_dim) == (4, 1, 16)
    assert not found.tie_word_embeddings and read().group_size == 2
    assert read(head_dim=None, num_key_value_heads=None, rope_theta=None, tie_word_embeddings=None) == found


def test_head_dim_is_derived_only_if_it_is_absent():
    assert read(head_dim=20).head_dim == 20
    assert read(head_dim=20, hidden_size=66).head_dim == 20


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({}, None, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 0]}, (3, 0)),
        ({"eos_token_id": [2, 1]}, None, (2, 1)),
    ],
)
def test_stop_tokens_come_from_the_generation_config_first(config, generation, stops):
    assert from_hugging_face(PLAIN | config, generation).stop_tokens == stops


def test_the_pad_token_is_none_unless_said():
    assert read(eos_token_id=2).pad_token is None
    assert read(pad_token_id=0).pad_token == 0


# --- sliding windows --------------------------------------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("architecture", "changes", "window"),
    [
        ("MistralForCausalLM", {}, None),
        ("MistralForCausalLM", {"sliding_window": None}, None),
        ("MistralForCausalLM", {"sliding_window": 64}, 64),
        ("MinistralForCausalLM", {"sliding_window": 64, "layer_types": [SLIDING, FULL, FULL]}, 64),
        ("MinistralForCausalLM", {"sliding_window": 64, "layer_types": [FULL] * 3}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0}, None),
        ("Qwen3ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, 64),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, 64),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3, "layer_types": [SLIDING] * 3},
            64,
        ),
    ],
)
def test_a_sliding_window_counts_only_where_a_layer_uses_it(architecture, changes, window):
    assert read(architectures=[architecture], **changes).sliding_window == window


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [["Qwen3MoeForCausalLM"], [], None, "", ["", "LlamaForCausalLM"], [["x"]], 3])
def test_other_architectures(value):
    message = refused("unsupported architecture", architectures=value)
    assert all(name in message for name in ARCHITECTURES)


INTEGERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize("field", [*INTEGERS, "rms_norm_eps"])
def test_a_missing_field(field):
    refused(f"field {field!r} is missing", **{field: None})
    with pytest.raises(CheckpointError, match=f"field '{field}' is missing"):
        from_hugging_face({name: value for name, value in PLAIN.items() if name != field})


@pytest.mark.parametrize("field", [*INTEGERS, "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, [64], {}, float("nan")])
def test_a_number_that_is_no_positive_integer(field, value):
    refused(f"{field} must be a positive integer, found {value!r}", **{field: value})


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize(
    "value", [0, -1e-5, "1e-5", True, [1], float("nan"), float("inf"), pytest.param(10**400, id="1e400")]
)
def test_a_number_that_is_not_positive_and_finite(field, value):
    refused(f"{field} must be a positive number", **{field: value})


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias"])
@pytest.mark.parametrize("value", [0, 1, "true", [True]])
def test_a_switch_that_is_no_boolean(field, value):
    refused(f"{field} must be true or false, found {value!r}", **{field: value})


def test_heads_that_do_not_divide():
    refused("num_attention_heads (4)", "num_key_value_heads (3)", num_key_value_heads=3)
    refused("num_attention_heads (4)", "num_key_value_heads (8)", num_key_value_heads=8)
    refused("head_dim is absent", "hidden_size (66)", "num_attention_heads (4)", hidden_size=66)
    refused("head_dim (15) must be even", head_dim=15)


@pytest.mark.parametrize("kind", ["longrope", "yarn", "linear", "dynamic", "su", "mrope", "", None, 3, ["llama3"]])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_other_rotary_embeddings_never_fall_back_to_the_default(kind, field):
    refused(f"unsupported rope_type {kind!r}", field, **{field: {"rope_type": kind} | LLAMA3})
    if field == "rope_scaling":
        refused(f"unsupported rope_type {kind!r}", rope_scaling={"type": kind, "factor": 2.0})


@pytest.mark.parametrize("field", LLAMA3)
def test_the_rule_of_llama3_needs_its_four_numbers(field):
    kind = {"rope_type": "llama3"}
    refused(f"field {field!r} is missing", rope_scaling=kind | {n: v for n, v in LLAMA3.items() if n != field})
    for value in (0, "8", True, -1):
        refused(f"{field} must be a positive", f"found {value!r}", rope_scaling=kind | LLAMA3 | {field: value})


@pytest.mark.parametrize(("low", "high"), [(4.0, 4.0), (4.0, 1.0)])
def test_the_ramp_of_llama3_must_rise(low, high):
    scaling = {"rope_type": "llama3"} | LLAMA3 | {"low_freq_factor": low, "high_freq_factor": high}
    refused("low_freq_factor", "high_freq_factor", str(low), str(high), rope_scaling=scaling)


def test_other_oddities_of_the_rotary_embedding():
    refused("rope_scaling has factor 4.0 but no rope_type", rope_scaling={"factor": 4.0})
    refused("rope_parameters has short_factor [1.5] but no", rope_parameters={"rope_theta": 7, "short_factor": [1.5]})
    refused("rope_scaling has factor 4.0 but rope_type 'default'", rope_scaling={"type": "default", "factor": 4.0})
    refused("rope_scaling names two types: {'rope_type': 'llama3', 'type': 'linear'}",
            rope_scaling={"rope_type": "llama3", "type": "linear"} | LLAMA3)  # fmt: skip
    refused("rope_parameters of its own for full_attention layers is not supported",
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}})  # fmt: skip
    refused("both present", rope_scaling={"type": "default"}, rope_parameters={"rope_type": "default"})
    refused("rope_scaling must be an object, found 'llama3'", rope_scaling="llama3")
    refused("rope_parameters must be an object, found [1]", rope_parameters=[1])
    refused("partial_rotary_factor 0.5", partial_rotary_factor=0.5)
    refused("partial_rotary_factor 0.5", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})


def test_other_models():
    refused("hidden_act 'gelu'", hidden_act="gelu")
    refused("mlp_bias", mlp_bias=True)


@pytest.mark.parametrize("value", [{"quant_method": "awq"}, {}, "awq", True, ["awq"]])
def test_quantised_models(value):
    refused("quantization_config", "unquantised", quantization_config=value)


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "3"], [None], {}])
def test_token_ids_that_are_none(value):
    refused(f"eos_token_id must be a token id or a list of them, found {value!r}", eos_token_id=value)
    refused("pad_token_id", pad_token_id=value)
    refused("eos_token_id", generation={"eos_token_id": value})


@pytest.mark.parametrize("value", [0, -1, "64", 1.5, True])
def test_a_sliding_window_that_is_none(value):
    refused(f"sliding_window must be a positive integer, found {value!r}", sliding_window=value)
