"""Where records are written to: a file that grows line by line, or objects that are each written once."""

import os
import time
from typing import Protocol, runtime_checkable

from etils import epath

from fastkv_jax.files import sync_folder


@runtime_checkable
class Writer(Protocol):
    """Takes lines, each a record."""

    def add(self, line: bytes) -> None:
        """Write a line, now or a little later; raises `OSError`."""
        ...

    def flush(self) -> None:
        """Write what was not yet written."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class LocalPart:
    """A file, made for its first line. A line is on the disk when `add` returns."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._handle: int | None = None

    def add(self, line: bytes) -> None:
        """Raises `OSError` naming the file, for instance when the disk is full; earlier lines stay."""
        try:
            if self._handle is None:
                self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
                sync_folder(self._path.parent)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class RemoteParts:
    """Objects that are never appended to: gcsfs would replace what is there.

    Lines wait until there are `every` of them, or, looked at when a line comes, `seconds` have passed since the last
    object. What waits is lost if the process is killed, and answered again.
    """

    def __init__(self, folder: epath.Path, process: int, number: int, *, every: int = 32, seconds: float = 60.0):
        self._folder, self._process, self._number = folder, process, number
        self._every, self._seconds = every, seconds
        self._lines: list[bytes] = []
        self._written = time.monotonic()

    def add(self, line: bytes) -> None:
        """Keep the line; write a part if it is time."""
        self._lines.append(line)
        if len(self._lines) >= self._every or time.monotonic() - self._written >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a new part."""
        self._written = time.monotonic()
        if not self._lines:
            return
        path, lines = part_path(self._folder, self._process, self._number), self._lines
        # What fails is not tried again under this name: nobody knows how far it went.
        self._number, self._lines = self._number + 1, []
        if path.exists():  # whoever was taken over lives
            raise OSError(f"{path} was written by another process, which lives; this one ends")
        path.write_bytes(b"".join(lines))

    def close(self) -> None:
        """Write what waits."""
        self.flush()


def part_path(folder: epath.Path, process: int, number: int) -> epath.Path:
    """Where a part is."""
    return folder / f"part-{process}-{number}.jsonl"
