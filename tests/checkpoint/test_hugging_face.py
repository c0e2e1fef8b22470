"""Round trips through Hugging Face folders, and folders that do not fit together."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastkv_jax.checkpoint import inspect, load_model
from fastkv_jax.checkpoint.hugging_face import NAMES
from fastkv_jax.errors import CheckpointError, FastKVConfigError, ModelWarning


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"qkv_bias": True, "output_bias": True}),
        ("Qwen2ForCausalLM", {"qkv_bias": True}),
        ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 16}),
        ("LlamaForCausalLM", {"num_kv_heads": 4}),
    ],
)
def test_round_trip(tmp_path, tiny, shards, architecture, changes):
    model = tiny.model(**changes)
    folder = tiny.write_hugging_face(tmp_path, model, shards=shards, architecture=architecture)
    tiny.assert_same(load_model(folder, "float32"), model)
    assert inspect(folder) == model.config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.bfloat16, np.dtype("float32")])
def test_dtypes(tmp_path, tiny, dtype):
    model = tiny.model()
    found = load_model(tiny.write_hugging_face(tmp_path, model), dtype)
    wanted = jnp.dtype(dtype)
    assert all(leaf.dtype == wanted for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(found.layers.wq[...], model.layers.wq[...].astype(wanted))


@pytest.mark.parametrize("dtype", ["int8", "float64", "half-precision", 3, None, np.int32])
def test_wrong_dtype(tmp_path, dtype):
    with pytest.raises(FastKVConfigError, match="supported: float32, bfloat16, float16"):
        load_model(tmp_path, dtype)


def test_stored_as_bfloat16(tmp_path, tiny):
    model = tiny.model()
    folder = tiny.write_hugging_face(tmp_path, model)

    def shrink(tensors):
        tensors.update({name: values.astype(ml_dtypes.bfloat16) for name, values in tensors.items()})

    rewrite(folder, shrink)
    wanted = model.layers.w_up[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(load_model(folder, "float32").layers.w_up[...], wanted.astype(jnp.float32))


def test_ignored_tensors(tmp_path, tiny):
    model = tiny.model(tie_word_embeddings=True)
    extra = {
        "lm_head.weight": np.asarray(model.embedding[...]),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(16, np.float32),
    }
    tiny.assert_same(load_model(tiny.write_hugging_face(tmp_path, model, **extra), "float32"), model)


def test_a_copy_of_embeddings_that_hold_nan_is_a_copy(tmp_path, tiny):
    model = tiny.model(tie_word_embeddings=True)
    model.embedding[...] = model.embedding[...].at[5, 5].set(np.nan)
    folder = tiny.write_hugging_face(tmp_path / "m", model, **{"lm_head.weight": np.asarray(model.embedding[...])})
    assert load_model(folder, "float32").config.tie_word_embeddings
    with pytest.raises(CheckpointError, match="NaN or infinity in model.embed_tokens.weight$"):
        load_model(folder, "float32", check_weights=True)


def test_a_head_that_is_not_the_embeddings_is_used_though_the_config_ties_them(tmp_path, tiny):
    model = tiny.model()
    folder = tiny.write_hugging_face(tmp_path, model)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(ModelWarning, match="lm_head.weight differs from model.embed_tokens.weight; the file's"):
        tiny.assert_same(load_model(folder, "float32"), model)


@pytest.mark.parametrize("old", ["model.safetensors", "model-00001-of-00003.safetensors"])
def test_two_sets_of_weights_are_refused(tmp_path, tiny, old):
    """Old weights beside newer shards: nobody can tell which are meant."""
    before = tiny.write_hugging_face(tmp_path / "before", tiny.model())
    folder = tiny.write_hugging_face(tmp_path / "now", tiny.model(), shards=2)
    tiny.assert_same(load_model(folder, "float32"), tiny.model())
    (before / "model.safetensors").rename(folder / old)
    with pytest.raises(CheckpointError, match=f"model-00001-of-00002.safetensors.* and {old}"):
        inspect(folder)


def test_a_shard_beside_the_only_file_is_refused(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    (folder / "model-00002-of-00002.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="model.safetensors.* and model-00002-of-00002.safetensors"):
        inspect(folder)


def test_missing_tensors_are_cut_at_ten(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "self_attn" in name])
    with pytest.raises(CheckpointError, match=r"12 missing: .* and 2 more"):
        inspect(folder)


def test_three_lists(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())

    def damage(tensors):
        tensors["surprise"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:90]

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    message = str(error.value)
    assert "1 missing: model.norm.weight" in message and "1 unexpected: surprise" in message
    assert "lm_head.weight is [90, 64], expected [96, 64] (vocab_size x hidden_size)" in message


def test_a_billion_layers(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    edit(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="only 30 tensors"):
        inspect(folder)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("model.norm.weight", np.ones(64, np.float64), "model.norm.weight has dtype F64"),
        ("model.norm.weight", np.ones(64, np.int8), "I8"),
        ("model.layers.0.mlp.up_proj.qweight", np.ones(64, np.int32), "GPTQ"),
    ],
)
def test_unsupported_tensors(tmp_path, tiny, name, values, words):
    folder = tiny.write_hugging_face(tmp_path, tiny.model(), **{name: values})
    with pytest.raises(CheckpointError, match=words):
        inspect(folder)


def test_eight_bit_floats_are_named(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    header = {"model.norm.weight": {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(CheckpointError, match="F8_E4M3.*unquantised"):
        inspect(folder)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"architectures": ["BertModel"]}'])
def test_bad_config(tmp_path, tiny, content):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json"):
        inspect(folder)


def test_stop_tokens_of_generation_config(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2], "pad_token_id": 7}')
    assert (inspect(folder).stop_tokens, inspect(folder).pad_token) == ((5, 2), 7)


def test_float16_overflow(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    name = NAMES["wk"].format(1)
    rewrite(folder, lambda tensors: tensors[name].__setitem__((0, 0), 1e6))
    assert bool(jnp.isfinite(load_model(folder, "bfloat16").layers.wk[...]).all())
    with pytest.raises(CheckpointError, match=rf"{name} reaches 1e\+06"):
        load_model(folder, "float16")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_check_weights(tmp_path, tiny, value):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    names = [NAMES["w_down"].format(2), NAMES["norm"]]
    rewrite(folder, lambda tensors: [tensors[name].__setitem__(..., value) for name in names])
    load_model(folder, "float16")
    with pytest.raises(CheckpointError) as error:
        load_model(folder, check_weights=True)
    assert all(name in str(error.value) for name in names) and str(error.value).count("model.") == 2


def test_progress_on_stderr(tmp_path, tiny, capfd):
    folder = tiny.write_hugging_face(tmp_path, tiny.model())
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    load_model(folder, progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "100%" in captured.err
