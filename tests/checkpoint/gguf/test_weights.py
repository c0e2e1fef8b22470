"""Round trips through GGUF files written with the `gguf` package, damaged files, and the real one."""

import struct
import subprocess
import sys
import warnings

import gguf
import numpy as np
import pytest

from fastkv_jax.checkpoint import declared_end_tokens, inspect, load_model, resolve
from fastkv_jax.checkpoint.gguf.file import open_gguf
from fastkv_jax.errors import CheckpointError, ModelWarning
from fastkv_jax.model.config import RopeConfig

F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "qkv_bias": True, "output_bias": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize(("kind", "atol"), [(F32, 0.0), (F16, 2e-3), (Q8_0, 2e-2)])
def test_round_trip(tmp_path, tiny, architecture, changes, kind, atol):
    model = tiny.model(**changes)
    path = tiny.write_gguf(tmp_path / "m.gguf", model, architecture=architecture, kind=kind)
    tiny.assert_same(load_model(path, "float32"), model, atol)
    assert inspect(path) == model.config


def test_rows_in_chunks_equal_rows_at_once(tmp_path, tiny, monkeypatch):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), kind=Q8_0)
    whole = load_model(path)
    monkeypatch.setattr("fastkv_jax.checkpoint.gguf.weights._CHUNK", 300)
    tiny.assert_same(load_model(path), whole)


def test_rope_divisors(tmp_path, tiny):
    divisors = np.linspace(1, 8, 16, dtype=np.float32)
    path = tiny.write_gguf(
        tmp_path / "m.gguf", tiny.model(), change=lambda writer: writer.add_tensor("rope_freqs.weight", divisors)
    )
    assert inspect(path).rope.scaling == tuple(divisors.tolist())


def test_stop_tokens(tmp_path, tiny):
    def change(writer):
        writer.add_eot_token_id(9)
        writer.add_pad_token_id(4)

    config = inspect(tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), change=change))
    assert (config.stop_tokens, config.pad_token) == ((2, 9), 4)


def linear(factor):
    def change(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)

    return change


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_scale_that_changes_nothing(tmp_path, tiny, factor):
    assert inspect(tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), change=linear(factor))).rope.scaling is None


def test_ids_outside_the_vocabulary(tmp_path, tiny):
    def change(writer):
        writer.add_eot_token_id(999)
        writer.add_pad_token_id(2**32 - 1)

    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), change=change)
    with pytest.warns(ModelWarning, match="end token 999 is outside the 96 tokens; not used"):
        config = inspect(path)
    assert (config.stop_tokens, config.pad_token) == ((2,), None)


@pytest.mark.parametrize(
    "name", ["m.gguf-split-a", "m.gguf-split-b", "m.gguf.part1of2", "m.gguf.part2of2", "m.gguf.001", "m.gguf.aa"]
)
def test_a_piece_of_a_file_is_to_be_joined(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF" if name[-1] == "a" else b"rest")
    with pytest.raises(CheckpointError, match=r"join all pieces first, in order: cat m.gguf[-.]\* > m.gguf$"):
        resolve(tmp_path / name)


@pytest.mark.parametrize("name", ["m.gguf.bk", "m.gguf.gz", "m.gguf-old"])
def test_a_whole_file_of_another_name_is_no_piece(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    assert resolve(tmp_path / name).kind == "gguf"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_array("tokenizer.ggml.pre", ["gpt-2"]), r"ggml.pre must be a text, found \['gpt-2'\]"),
        (lambda w: w.add_string("split.count", "2"), "split.count must be an integer, found '2'"),
        (lambda w: w.add_bool("split.no", True), "split.no must be an integer, found True"),
        (lambda w: w.add_string("tokenizer.ggml.bos_token_id", "x"), "bos_token_id must be an integer, found 'x'"),
        (lambda w: w.add_uint32("tokenizer.chat_template", 3), "chat_template must be a text, found 3"),
        (lambda w: w.add_uint32("tokenizer.ggml.add_bos_token", 1), "add_bos_token must be true or false, found 1"),
        (lambda w: w.add_array("tokenizer.ggml.tokens", [1, 2]), "tokens must be a list of strings, found"),
        (lambda w: w.add_string("tokenizer.ggml.merges", "a b"), "merges must be a list of strings, found 'a b'"),
        (lambda w: w.add_array("tokenizer.ggml.token_type", ["1"]), "token_type must be a list of integers"),
        (lambda w: w.add_array("tokenizer.ggml.scores", ["1"]), "scores must be a list of numbers"),
    ],
)
def test_keys_of_another_type(tmp_path, tiny, change, words):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), change=change)
    with pytest.raises(CheckpointError, match=words) as error:
        inspect(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.type 'yarn'"),
        (lambda w: w.add_rope_scaling_factor(4.0), "unsupported rope.scaling.factor 4.0; supported: 1"),
        (linear(4.0), "unsupported rope.scaling.factor 4.0 beside rope.scaling.type 'linear'; supported: 1"),
        (lambda w: w.add_float32("llama.rope.scale_linear", 8.0), "unsupported rope.scale_linear 8.0; supported: 1"),
        (lambda w: w.add_float32("llama.rope.scaling.attn_factor", 0.5), "rope.scaling.attn_factor 0.5; supported: 1"),
        (lambda w: w.add_string("llama.rope.scaling.factor", "4"), "unsupported rope.scaling.factor '4'"),
        (lambda w: w.add_array("llama.rope.scaling.type", ["none"]), r"unsupported rope.scaling.type \['none'\]"),
        (lambda w: w.add_expert_count(8), "expert_count is 8"),
        (lambda w: w.add_rope_dimension_count(16), "rope.dimension_count is 16"),
        (lambda w: w.add_tensor("surprise", np.ones(3, np.float32)), "1 unexpected: surprise"),
        (lambda w: w.add_uint16("split.count", 4), "one of 4 parts"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)), "rope_freqs.weight is"),
        (lambda w: w.add_tensor("x", np.ones((2, 4), np.int32)), "tensor x has quantisation type I32"),
    ],
)
def test_unsupported(tmp_path, tiny, change, words):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), change=change)
    with pytest.raises(CheckpointError, match=words) as error:
        inspect(path)
    assert str(path) in str(error.value)


TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", *(chr(97 + i) for i in range(26))]


def with_tokens(writer, kinds=None, template=None):
    writer.add_token_list([*TOKENS, *(f"t{i}" for i in range(96 - len(TOKENS)))])
    if kinds is not None:
        writer.add_token_types(kinds)
    if template is not None:
        writer.add_chat_template(template)


def test_a_turn_ends_with_what_its_text_says_where_no_key_does(tmp_path, tiny):
    """Files from before there was a key for the end of a turn."""
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), change=with_tokens)
    with pytest.warns(
        ModelWarning, match=r"file's keys </s> \(2\); .*; the texts of its tokens <\|eot_id\|> \(5\) and"
    ):
        assert inspect(path).stop_tokens == (2, 5, 4)
    assert declared_end_tokens(path) == (2,)


def test_a_turn_ends_with_what_the_template_says(tmp_path, tiny):
    template = "{% for m in messages %}{{ m.content }}<unk>{% endfor %}"
    kinds = [2, 3, 3, 1, 1, 1] + [1] * 90
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), change=lambda w: with_tokens(w, kinds, template))
    with pytest.warns(ModelWarning, match="its chat template <unk>"):
        assert inspect(path).stop_tokens[:2] == (2, 0)


@pytest.mark.parametrize(("context", "theta", "said"), [(131072, 5e5, True), (32768, 5e5, True), (8192, 5e5, False),
                                                        (131072, 1e6, False)])  # fmt: skip
def test_positions_of_llama_3_1_without_their_scale_are_doubted(tmp_path, tiny, context, theta, said):
    model = tiny.model(max_position_embeddings=context, rope=RopeConfig(theta, None))
    path, folder = tiny.write_gguf(tmp_path / "m.gguf", model), tiny.write_hugging_face(tmp_path / "m", model)
    for source, field in ((path, "rope_freqs.weight"), (folder, "rope_scaling")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            inspect(source)
        assert [f"no {field}: positions are not scaled" in str(one.message) for one in caught] == [True] * said


def split(path, model, parts):
    """A model in parts, as llama.cpp's gguf-split writes it: the first has the metadata and the first tensors."""
    whole = gguf.GGUFReader(path)
    total, paths = len(whole.tensors), []
    for number in range(parts):
        paths.append(path.with_name(f"big-{number + 1:05}-of-{parts:05}.gguf"))
        writer = gguf.GGUFWriter(paths[-1], "llama")
        if number == 0:
            for field in whole.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", total)
        for tensor in whole.tensors[number::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_parts_beside_each_other_are_one_model(tmp_path, tiny):
    model = tiny.model()
    paths = split(tiny.write_gguf(tmp_path / "m.gguf", model, kind=Q8_0), model, 3)
    whole = load_model(tmp_path / "m.gguf", "float32")
    for path in paths:
        assert resolve(path).name == "big"
        tiny.assert_same(load_model(path, "float32"), whole)


def test_parts_that_do_not_belong_together(tmp_path, tiny):
    model = tiny.model()
    paths = split(tiny.write_gguf(tmp_path / "m.gguf", model), model, 3)
    second = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="one of 3 parts, of which big-00002-of-00003.gguf is not beside it"):
        inspect(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match="one of 3 parts, number 3, but its name says 2 of 3"):
        inspect(paths[0])
    paths[1].write_bytes(second[: len(second) // 2])
    with pytest.raises(CheckpointError, match="big-00002-of-00003.gguf is truncated"):
        inspect(paths[0])


def test_everything_else_works_without_the_gguf_package(tmp_path, tiny):
    folder, path = tiny.write_hugging_face(tmp_path / "m", tiny.model()), tmp_path / "m.gguf"
    tiny.write_gguf(path, tiny.model())
    code = f"""
import sys
sys.modules["gguf"] = None
import fastkv_jax as fk
fk.load_model({str(folder)!r})
try:
    fk.load_model({str(path)!r})
except fk.CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "pip install gguf" in done.stdout, done.stderr


def test_unsupported_architecture(tmp_path, tiny):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model(), architecture="gemma3")
    with pytest.raises(CheckpointError, match="'gemma3'; supported: llama, qwen2, qwen3"):
        inspect(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"key",
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 62),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1 << 62),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77),
        b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"\xff", 8, 0),
    ],
)
def test_corrupt(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="m.gguf") as error:
        inspect(path)
    assert "\n" not in str(error.value)


def test_truncated_anywhere(tmp_path, tiny):
    whole = tiny.write_gguf(tmp_path / "whole.gguf", tiny.model()).read_bytes()
    path = tmp_path / "m.gguf"
    for length in [*range(0, 2000, 97), len(whole) // 2, len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="m.gguf"):
            inspect(path)


def test_real_file(smollm2_path):
    """Values of layer 0's wk, undone from llama.cpp's layout by the published formula, independently of the loader."""
    config = inspect(smollm2_path)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.rope.theta, config.rms_norm_eps) == (49152, 100000.0, 1e-5)
    assert config.tie_word_embeddings and config.stop_tokens == (2,)
    file = open_gguf(smollm2_path)
    stored = file.rows(file.tensors["blk.7.attn_k.weight"], 0, 192)
    wanted = np.stack([stored[h * 64 + d % 32 * 2 + d // 32] for h in range(3) for d in range(64)])
    np.testing.assert_array_equal(load_model(smollm2_path, "float32").layers.wk[...][7], wanted)
