"""Writing a file so that it is either complete or absent."""

import os
import tempfile
from pathlib import Path

from fastkv_jax.errors import FastKVConfigError


def check_target(path: str | os.PathLike[str], *suffixes: str) -> Path:
    """The path, or `FastKVConfigError` for another suffix, a folder in its place or no folder to hold it."""
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise FastKVConfigError(f"cannot write {target}: its name must end in {' or '.join(suffixes)}")
    if target.is_dir():
        raise FastKVConfigError(f"cannot write {target}: it is a folder")
    if not target.absolute().parent.is_dir():
        raise FastKVConfigError(f"cannot write {target}: there is no folder {target.parent}")
    return target


def write_whole(target: Path, content: bytes) -> None:
    """Write or replace a file in one step.

    It is made in a folder beside the target, so that it has the usual permissions and a failed write leaves nothing.
    """
    with tempfile.TemporaryDirectory(prefix=".writing", dir=target.absolute().parent) as scratch:
        complete = Path(scratch, target.name)
        complete.write_bytes(content)
        os.replace(complete, target)
