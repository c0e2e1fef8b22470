"""Malformed files, made by hand: each must be refused by name before anything is read."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastkv_jax.checkpoint.safetensors_files import INDEX, SINGLE, find_tensors, read_header
from fastkv_jax.errors import CheckpointError


def pack(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(first=0, last=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


GOOD = pack({"__metadata__": {"format": "pt"}, "a": entry()}, bytes(8))


def test_good_file(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(GOOD)
    (tensor,) = read_header(tmp_path / "m.safetensors").values()
    assert (tensor.dtype, tensor.shape) == ("F32", (2,))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>log in</body></html>", "web page"),
        (b"  <html><body>log in please</body></html>", "web page"),
        (b"PK\x03\x04" + bytes(60), "pickle"),
        (b"\x80\x02" + b"}q\x00." * 20, "pickle"),
        (b"GGUF" + bytes([3, 0, 0, 0]) * 8, "GGUF"),
        (GOOD[:20], "too short"),
        (GOOD[:-1], "truncated"),
        (GOOD + b"x", "1 trailing bytes"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header too large"),
        (pack(b"not json"), "valid JSON"),
        (pack(b"\xff\xfe"), "valid JSON"),
        (pack(b"[" * 100_000), "valid JSON"),
        (pack([1]), "JSON object"),
        (pack(b'{"a": 1, "a": 2}'), "duplicate key 'a'"),
        (pack({"a": {"dtype": "F32"}}), "exactly dtype"),
        (pack({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
        (pack({"a": entry(shape=(True, 2))}, bytes(8)), "shape"),
        (pack({"a": entry(shape=(3,))}, bytes(8)), "needs 12 bytes"),
        (pack({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "needs"),
        (pack({"a": entry(dtype="Q5")}, bytes(8)), "unknown dtype 'Q5'"),
        (pack({"a": entry(), "b": entry(4, 12)}, bytes(12)), "overlaps"),
        (pack({"a": entry(), "b": entry(12, 20)}, bytes(20)), "hole"),
        (pack({"a": entry(8, 0)}, bytes(8)), "needs 8 bytes"),
    ],
)
def test_malformed_file(tmp_path, content, words):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        find_tensors(tmp_path)
    assert SINGLE in str(error.value) and "\n" not in str(error.value)


def write_shards(folder, weight_map, **files):
    for name, tensors in files.items():
        save_file({t: np.zeros(2, np.float32) for t in tensors}, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path):
    write_shards(tmp_path, {"x": "one.safetensors", "y": "two.safetensors"}, one=["x"], two=["y"])
    assert {name: tensor.file.name for name, tensor in find_tensors(tmp_path).items()} == {
        "x": "one.safetensors",
        "y": "two.safetensors",
    }


@pytest.mark.parametrize(
    "name",
    ["../one.safetensors", "/etc/one.safetensors", "C:\\one.safetensors", "a\\one.safetensors", "sub/one.safetensors",
     "one.bin", ".safetensors", "..", 7, None, ["one.safetensors"]],
)  # fmt: skip
def test_bad_shard_name(tmp_path, name):
    write_shards(tmp_path, {"x": name}, one=["x"])
    with pytest.raises(CheckpointError, match="plain file name"):
        find_tensors(tmp_path)


def test_all_missing_shards_are_listed(tmp_path):
    write_shards(tmp_path, {"x": "one.safetensors", "y": "two.safetensors", "z": "three.safetensors"}, one=["x"])
    with pytest.raises(CheckpointError, match=r"2 of 3 shards are missing: three.safetensors, two.safetensors"):
        find_tensors(tmp_path)


def test_tensor_in_the_wrong_shard(tmp_path):
    write_shards(tmp_path, {"x": "two.safetensors", "y": "two.safetensors"}, one=["x"], two=["y"])
    with pytest.raises(CheckpointError, match="tensor x is listed in two.safetensors"):
        find_tensors(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, {"x": "one.safetensors", "y": "two.safetensors"}, one=["x"], two=["x", "y"])
    with pytest.raises(CheckpointError, match="in both"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense", "[]"])
def test_bad_index(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX):
        find_tensors(tmp_path)


@pytest.mark.parametrize("single", [True, False])
def test_link_out_of_the_folder(tmp_path, single):
    model, secret = tmp_path / "model", tmp_path / "secret.safetensors"
    model.mkdir()
    save_file({"x": np.zeros(2, np.float32)}, secret)
    os.symlink(secret, model / (SINGLE if single else "one.safetensors"))
    if not single:
        write_shards(model, {"x": "one.safetensors"})
    with pytest.raises(CheckpointError, match="outside the model folder"):
        find_tensors(model)


def test_links_into_the_hub_cache(tmp_path):
    cache, snapshot = tmp_path / "models--org--name", tmp_path / "models--org--name" / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"x": np.zeros(2, np.float32)}, cache / "blobs" / "0123")
    os.symlink("../../blobs/0123", snapshot / SINGLE)
    assert list(find_tensors(snapshot)) == ["x"]


def test_folders_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        find_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="never opened"):
        find_tensors(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match="no model.safetensors.index.json"):
        find_tensors(tmp_path)
