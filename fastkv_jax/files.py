"""Files and folders that are whole or not there at all, whenever their writer dies."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkv_jax.errors import InputError

SCRATCH = ".writing"
_LEFTOVER = re.compile(re.escape(SCRATCH) + "[a-z0-9_]{8}")  # as `tempfile` names them, and nobody else


def check_target(path: str | os.PathLike[str]) -> Path:
    """Raise `InputError` if a file cannot stand there: a folder does, or the folder to hold it does not exist."""
    target = Path(path)
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder")
    if not target.absolute().parent.is_dir():
        raise InputError(f"cannot write {target}: there is no folder {target.absolute().parent}")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the target's place if the block ends well and leaves nothing otherwise."""
    target = check_target(path)
    with scratch_in(target.absolute().parent) as scratch:
        complete = scratch / target.name
        yield complete
        os.replace(complete, target)


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder of one's own inside `folder`, gone when the block ends.

    What is written there has the usual permissions and is renamed to its place in one step. A killed writer leaves its
    scratch behind: the next one removes it, which the kernel's lock (flock) tells from a living writer's. Where folders
    cannot be locked (NFS), leftovers stay, and are in nobody's way.
    """
    remove_leftovers(folder)
    scratch, handle = _made_and_locked(folder)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove the scratch of writers that died; a living one's stays."""
    with contextlib.suppress(OSError):  # a folder one may write to, but not list
        for path in [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]:
            with contextlib.suppress(OSError):  # not a folder, gone by now, of another user, no locks here
                _remove_if_dead(path)


def _made_and_locked(folder: Path) -> tuple[Path, int]:
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(scratch, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is(scratch, handle):
                return scratch, handle
            os.close(handle)  # another writer took it for a leftover before it was locked


def _remove_if_dead(scratch: Path) -> None:
    handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(scratch, handle):
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until the names of a folder on a disk are on it: a file that was synced could otherwise lose its own."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
