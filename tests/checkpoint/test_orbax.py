"""Our own checkpoint: round trips, sharding, interruption, damage."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax.checkpoint import inspect, load_model, orbax, resolve
from fastkv_jax.errors import CheckpointError, FastKVConfigError
from fastkv_jax.model.config import Llama3Scaling, RopeConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "scaling", [None, Llama3Scaling(8.0, 1.0, 4.0, 64), (1.0, 2.0, 4.0)], ids=["plain", "llama3", "divisors"]
)
def test_round_trip(tmp_path, tiny, scaling, monkeypatch):
    model = tiny.model(rope=RopeConfig(5e5, scaling), qkv_bias=True, qk_norm=True)
    orbax.save(model, tmp_path / "m")
    assert resolve(tmp_path / "m").kind == "orbax"
    tiny.assert_same(load_model(tmp_path / "m", "float32", check_weights=True), model)
    assert inspect(tmp_path / "m") == model.config
    monkeypatch.chdir(tmp_path)
    tiny.assert_same(load_model("m", "float32"), model)  # by a relative path
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("devices", [1, 2])
def test_sharded(tmp_path, tiny, devices):
    model = tiny.model()
    orbax.save(model, tmp_path / "m")
    mesh = jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices])
    found = load_model(tmp_path / "m", "float32", mesh)
    np.testing.assert_array_equal(found.layers.wq[...], model.layers.wq[...])
    assert found.layers.wq[...].addressable_shards[0].data.shape == (3, 128 // devices, 64)
    assert found.layers.w_down[...].addressable_shards[0].data.shape == (3, 64, 128 // devices)


def test_save_sharded_load_single(tmp_path, tiny):
    model = tiny.model()
    tiny.write_hugging_face(tmp_path / "hf", model)
    sharded = load_model(tmp_path / "hf", "float32", jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))
    orbax.save(sharded, tmp_path / "m")
    tiny.assert_same(load_model(tmp_path / "m", "float32"), model)


def test_cast(tmp_path, tiny):
    model = tiny.model()
    orbax.save(model, tmp_path / "m")
    found = load_model(tmp_path / "m", "bfloat16")
    np.testing.assert_array_equal(found.layers.wv[...], model.layers.wv[...].astype(jnp.bfloat16))
    huge = jax.tree.map(lambda a: a * jnp.float32(1e6), model)
    orbax.save(huge, tmp_path / "huge")
    with pytest.raises(CheckpointError, match="float16"):
        load_model(tmp_path / "huge", "float16")


def test_occupied_target(tmp_path, tiny):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(FastKVConfigError, match="not an empty folder"):
            orbax.save(tiny.model(), target)
    assert (tmp_path / "file").read_text() == "mine"


def test_leftovers_are_replaced_and_never_loaded(tmp_path, tiny):
    leftover = tmp_path / ".writingabcdefgh" / "m"
    leftover.mkdir(parents=True)
    (leftover / "rubbish").write_text("from a run that was cut off")
    with pytest.raises(CheckpointError):
        resolve(tmp_path / "m")
    orbax.save(tiny.model(), tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"] and not (tmp_path / "m" / "rubbish").exists()


PROCESS = """
import sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
folder, address, process, mesh = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
from fastkv_jax.checkpoint import load_model
assert jax.process_count() == 2 and len(jax.devices()) == 2
mine = jax.make_mesh((1,), ("data",), devices=jax.local_devices()) if mesh else None
began = time.time()
for _ in range(1 + int(process)):  # one process loads more often: nobody waits for the other
    model = load_model(folder, "float32", mesh=mine)
print(sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(model)))
"""


@pytest.mark.parametrize("mesh", ["", "mesh"])
def test_each_process_of_several_loads_for_itself(mesh, tmp_path, tiny):
    model = tiny.model()
    orbax.save(model, tmp_path / "m")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words = [sys.executable, "-c", PROCESS, tmp_path / "m", address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([*words, process, mesh], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for process in ("0", "1")
    ]
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    whole = sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(model))
    assert [float(out) for out, _ in ended] == [pytest.approx(whole, rel=1e-6)] * 2


def test_failure_leaves_nothing(tmp_path, tiny):
    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        orbax.save(tiny.model(), tmp_path / "m", fail)
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_checked_first(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="MB are needed") as error:
        orbax.save(tiny.model(), tmp_path / "m")
    assert error.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def edit(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shutil.rmtree(folder / "weights"),
        lambda folder: (folder / "weights" / "_METADATA").unlink(),
        lambda folder: (folder / "weights" / "_METADATA").write_text("{"),
        lambda folder: (folder / "weights" / "manifest.ocdbt").unlink(),
        lambda folder: [path.write_bytes(b"\0" * 64) for path in folder.rglob("d/*")],
        lambda folder: edit(folder, lambda content: content.update(version=99)),
        lambda folder: edit(folder, lambda content: content.pop("config")),
        lambda folder: edit(folder, lambda content: content["config"].pop("rope")),
        lambda folder: edit(folder, lambda content: content["config"].update(surprise=1)),
        lambda folder: edit(folder, lambda content: content["config"].update(vocab_size=97)),
        lambda folder: edit(folder, lambda content: content["config"].update(tie_word_embeddings=True)),
        lambda folder: edit(folder, lambda content: content["config"].update(qk_norm=True)),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that Orbax abandons
def test_damage_is_one_line(tmp_path, tiny, damage, capfd):
    orbax.save(tiny.model(), tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(CheckpointError, match="convert the model again|format version") as error:
        load_model(tmp_path / "m", "float32")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr().err == ""
