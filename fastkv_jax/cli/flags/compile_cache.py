"""Compiled programs kept between runs: bounded, checked when they are read, and never a reason to fail.

JAX's own cache takes what it finds for sound, so a damaged file is worse than none; it never replaces one that a killed
process left half written; and where a folder cannot be written to, it warns at every program.
"""

import contextlib
import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastkv_jax.errors import InputError
from fastkv_jax.files import replacing

LIMIT = 2 << 30  # bytes in our own folder, unless JAX_COMPILATION_CACHE_MAX_SIZE is set
SHORTEST = 0.1  # seconds a program must have taken to compile: a small model's, too
ENTRY, SUM = "-cache", "-sha256"


def use() -> None:
    """Have JAX keep programs in $JAX_COMPILATION_CACHE_DIR, or else in our own folder.

    Whatever else JAX's variables say holds as well: JAX_ENABLE_COMPILATION_CACHE=0,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, JAX_COMPILATION_CACHE_MAX_SIZE.
    """
    import jax

    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return
    own = own_folder()
    folder = config.jax_compilation_cache_dir or str(own)
    limit = None if config.jax_compilation_cache_max_size < 0 else config.jax_compilation_cache_max_size
    if folder == str(own):
        if not _is_safe(own):
            return  # a read-only home costs compile time, nothing else
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            limit = LIMIT
        config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:  # XLA fails where it cannot read or write its own
        config.update("jax_persistent_cache_enable_xla_caches", "none")
    if "://" not in folder:
        _put_in_jax(Programs(Path(folder), limit))


def own_folder() -> Path:
    """Where programs go if nobody says where."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "fastkv_jax" / "compiled"


def _is_safe(folder: Path) -> bool:
    """Make a folder that only this user can write to; False if it cannot be: what is read from it will be run."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        return folder.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _put_in_jax(programs: "Programs") -> None:
    """JAX has no door for another cache. Without this function it would use its own, in the same format."""
    with contextlib.suppress(ImportError):
        from jax._src import compilation_cache

        if hasattr(compilation_cache, "get_file_cache"):
            compilation_cache.get_file_cache = lambda path: (programs, path)


class Programs:
    """Entries in a folder, under JAX's names, each with its SHA-256 in a file beside it.

    The methods are those of JAX's `CacheInterface`. An entry without a sum is another program's, and believed. With
    more than `limit` bytes (None: no limit), those that were not used for longest go.
    """

    def __init__(self, folder: Path, limit: int | None):
        self._path = folder
        self._limit = limit
        self._writable = True

    def get(self, key: str) -> bytes | None:
        """The entry; None if it is missing, damaged or cannot be read."""
        entry = self._path / (key + ENTRY)
        try:
            value = entry.read_bytes()
            if not self._is_sound(key, value):
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)  # the time of its last use
        return value

    def put(self, key: str, value: bytes) -> None:
        """Write an entry, over a damaged one if there is one. What fails is said once and not tried again."""
        if not self._writable or (self._limit is not None and len(value) > self._limit):
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(self._path):
                self._make_room(len(value))
                for name, content in ((key + SUM, _sum(value)), (key + ENTRY, value)):
                    with replacing(self._path / name) as scratch:
                        scratch.write_bytes(content)
        except (OSError, InputError) as error:
            self._writable = False
            warnings.warn(f"compiled programs are not kept in {self._path}: {error}", stacklevel=2)

    def _is_sound(self, key: str, value: bytes) -> bool:
        try:
            return (self._path / (key + SUM)).read_bytes() == _sum(value)
        except FileNotFoundError:
            return True

    def _make_room(self, wanted: int) -> None:
        if self._limit is None:
            return
        found = []
        for path in self._path.glob("*" + ENTRY):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        size = wanted + sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, path in sorted(found):
            if size <= self._limit:
                return
            path.unlink(missing_ok=True)
            path.with_name(path.name.removesuffix(ENTRY) + SUM).unlink(missing_ok=True)
            size -= bytes_


def _sum(value: bytes) -> bytes:
    return hashlib.sha256(value).hexdigest().encode()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process writes at a time, so that an entry and its sum belong together."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks here: a pair that does not fit is compiled again
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
