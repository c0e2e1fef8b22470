"""Whole or not there at all; what a dead writer left is removed, what a living one is writing is not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastkv_jax import files
from fastkv_jax.errors import InputError

WRITER = """
import sys, types
package = types.ModuleType("fastkv_jax")  # without its __init__, which imports JAX
package.__path__ = [sys.argv[2]]
sys.modules["fastkv_jax"] = package
from fastkv_jax.files import replacing
with replacing(sys.argv[1]) as scratch:
    scratch.write_text("half")
    print(scratch.parent.name, flush=True)
    sys.stdin.read()
"""


def writer(target: Path) -> tuple[subprocess.Popen, str]:
    """A process in the middle of writing, and the name of its scratch."""
    package = str(Path(files.__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), package], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def write(target: Path) -> None:
    with files.replacing(target) as scratch:
        scratch.write_text("whole")


def test_a_file_is_replaced_or_left_as_it_was(tmp_path):
    target = tmp_path / "file"
    write(target)
    with pytest.raises(RuntimeError, match="stop"), files.replacing(target) as scratch:
        scratch.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "whole" and os.listdir(tmp_path) == ["file"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    for bad in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(InputError, match="cannot write"), files.replacing(bad):
            pass


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_killed_writers_scratch_is_removed_by_the_next(tmp_path):
    process, scratch = writer(tmp_path / "file")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and os.listdir(tmp_path) == [scratch]
    write(tmp_path / "other")
    assert os.listdir(tmp_path) == ["other"]


def test_a_living_writers_scratch_stays(tmp_path):
    process, scratch = writer(tmp_path / "file")
    write(tmp_path / "other")
    files.remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {"other", scratch}
    process.communicate("go on", timeout=60)
    assert process.returncode == 0 and (tmp_path / "file").read_text() == "half"
    assert set(os.listdir(tmp_path)) == {"other", "file"}


def test_a_scratch_taken_for_a_leftover_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    made, mkdtemp = [], files.tempfile.mkdtemp

    def disturbed(**options):
        scratch = mkdtemp(**options)
        made.append(scratch)
        if len(made) == 1:
            files.remove_leftovers(tmp_path)
        return scratch

    monkeypatch.setattr(files.tempfile, "mkdtemp", disturbed)
    write(tmp_path / "file")
    assert len(made) == 2 and os.listdir(tmp_path) == ["file"]


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing-a-thesis").mkdir()
    (tmp_path / ".writingabcdefgh").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".writinglinklink").symlink_to(tmp_path / "folder")
    before = set(os.listdir(tmp_path))
    write(tmp_path / "file")
    assert set(os.listdir(tmp_path)) == before | {"file"}


def test_where_folders_cannot_be_locked_nothing_is_removed_and_all_is_written(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(9, "Bad file descriptor")

    (tmp_path / ".writingabcdefgh").mkdir()
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    write(tmp_path / "file")
    assert set(os.listdir(tmp_path)) == {".writingabcdefgh", "file"}
