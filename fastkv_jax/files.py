"""Files that are whole or not there at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkv_jax.errors import InputError


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
    # In a folder beside the target, so that the file has the usual permissions and the rename is atomic.
    with tempfile.TemporaryDirectory(prefix=".writing", dir=target.absolute().parent) as scratch:
        complete = Path(scratch, target.name)
        yield complete
        os.replace(complete, target)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until the names of a folder on a disk are on it: a file that was synced could otherwise lose its own."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
