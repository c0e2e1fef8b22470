"""What is different between folders on a disk and on an object store."""

import os

from etils import epath


def is_remote(path: epath.Path) -> bool:
    """Whether a path is on an object store such as gs://: no appending, no renaming, no locks; a write is atomic."""
    return "://" in os.fspath(path)


def inside(folder: epath.Path) -> list[epath.Path]:
    """What a folder holds; nothing if it is not there, as on an object store a folder is only a part of names."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
