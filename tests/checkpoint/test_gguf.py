"""Round trips through GGUF files written with the `gguf` package, damaged files, and the real one."""

import struct

import gguf
import numpy as np
import pytest

from fastkv_jax.checkpoint import inspect, load_model
from fastkv_jax.checkpoint.gguf_file import open_gguf
from fastkv_jax.errors import CheckpointError

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
    monkeypatch.setattr("fastkv_jax.checkpoint.gguf._CHUNK", 300)
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.type 'yarn'"),
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
