"""Only one process at a time writes a share of an evaluation's records.

On a disk a lock is the kernel's (flock) and ends with its process, however that ends. Object stores know no locks:
there a marker says who writes, and one left behind by a killed process has to be taken over by hand. Two processes that
start within the same moment can both miss the other's marker.
"""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from fastkv_jax.errors import InputError
from fastkv_jax.evals.records.paths import inside, is_remote

TURN = ".lock"
LOCK = re.compile(r"\.lock-(\d+)-of-(\d+)")


@contextmanager
def turn(folder: epath.Path) -> Iterator[None]:
    """Wait for the folder, to set something up. On an object store nobody waits."""
    if is_remote(folder):
        yield
        return
    handle = os.open(folder / TURN, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def held(folder: epath.Path, process: int, processes: int, *, take_over: bool = False) -> Iterator[None]:
    """Write the share `process` of `processes` alone until the block ends; to be entered in one's `turn`.

    Raises `InputError` if the share is being written, or if the samples are being shared among another number of
    processes, whose shares would overlap with this one. `take_over`: markers on an object store are of the dead.
    """
    mine = folder / f".lock-{process}-of-{processes}"
    rivals = [path for path in inside(folder) if (match := LOCK.fullmatch(path.name)) and int(match[2]) != processes]
    if is_remote(folder):
        _clear([mine, *rivals], take_over)
        mine.write_text(_who())
        try:
            yield
        finally:
            mine.unlink(missing_ok=True)
        return
    for rival in rivals:
        os.close(_locked(rival))
    handle = _locked(mine)
    try:
        os.truncate(handle, 0)
        os.write(handle, _who().encode())
        yield
    finally:
        os.close(handle)


def _locked(path: epath.Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        who = os.read(handle, 1000).decode(errors="replace") or "another process"
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise InputError(f"{path.parent} is in use by {who}; wait for it, or choose another folder") from error
        raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(path)) from error
    return handle


def _clear(markers: list[epath.Path], take_over: bool) -> None:
    for path in markers:
        if not path.exists():
            continue
        if not take_over:
            raise InputError(
                f"{path.parent} is in use by {path.read_text()}; if that process is dead, give --take-over"
            )
        path.unlink()


def _who() -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"
