"""The folder an evaluation writes to: made or resumed, held by one process per share of the samples, never torn."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from etils import epath

from fastkv_jax import files
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.evals.records import locks, records
from fastkv_jax.evals.records.parts import LocalPart, RemoteParts, Writer, part_path
from fastkv_jax.evals.records.paths import inside, is_remote
from fastkv_jax.evals.records.records import FORMAT, RESULTS, RUN, SAMPLES, Key, Record, Torn

REMOTE = ("gs", "s3")
SCRATCH = (".lock", files.SCRATCH)  # beginnings of names that say nothing of what a folder is
PACKAGES = ("fastkv-jax", "jax", "jaxlib", "numpy", "tokenizers", "transformers")


@dataclass(frozen=True)
class Output:
    """A run's folder while this process holds it; see `opened`."""

    path: epath.Path
    config: Mapping[str, Any]
    config_hash: str
    process: int
    processes: int
    done: dict[Key, Record]  # of all processes, as found at the start, and what this one added
    notes: tuple[str, ...]  # what a person should know of what was found
    writer: Writer

    def expect(self, samples: Sequence[Key]) -> None:
        """Write down which samples the run is of; raises `InputError` if the folder is of others."""
        if not samples:
            raise InputError("there are no samples")
        if len(known := set(samples)) < len(samples):
            twice = next(key for key in samples if samples.count(key) > 1)
            raise InputError(f"two samples are called {' '.join(twice)}")
        with locks.turn(self.path):
            before = records.read_samples(self.path)
            if self.done.keys() - known or before not in (None, list(samples)):
                raise InputError(
                    f"{self.path} is of other samples than the {len(samples)} given here, or has another order; "
                    "choose another folder"
                )
            if before is None:
                write_whole(self.path / SAMPLES, json.dumps(samples, ensure_ascii=False).encode())

    def add(self, record: Record) -> None:
        """Write a record; raises `OSError` if the disk is full, `ValueError` for what is not JSON, such as NaN."""
        self.writer.add(records.as_line(record))
        self.done[record["task"], record["id"]] = record

    def finish(self, samples: Sequence[Key]) -> int:
        """Write results.jsonl if all processes' records are there; returns how many are missing.

        Every process does so at its end, so that the last one to end finds them all.
        """
        self.writer.flush()
        found = records.load(self.path, self.config_hash).records
        missing = sum(key not in found for key in samples)
        if not missing:
            write_whole(self.path / RESULTS, b"".join(records.as_line(found[key]) for key in samples))
        return missing


@contextmanager
def opened(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    process: int = 0,
    processes: int = 1,
    overwrite: bool = False,
    take_over: bool = False,
) -> Iterator[Output]:
    """Make a run's folder, or go on with one, and hold it against other processes until the block ends.

    However it ends, all records that were added are then written.

    `config` is everything the records depend on, as JSON has it. A folder of another configuration is refused;
    `overwrite` removes what such a run left. `take_over` is for gs:// alone, where a killed process leaves its marker.
    Raises `InputError` or `OSError`, for which there is no need of samples or a model yet.
    """
    if not 0 <= process < processes:
        raise FastKVConfigError(f"process must be in 0 ... {processes - 1}, got {process}")
    path = check_output(folder)
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(config))  # as it is read back: no tuples
    config_hash = records.hash_of(config)
    with ExitStack() as stack:
        with locks.turn(path):
            stack.enter_context(locks.held(path, process, processes, take_over=take_over))
            notes = _claim(path, config, config_hash, overwrite, process, processes)
        found = records.load(path, config_hash)
        for torn in found.torn:
            if torn.part.process == process:  # the others' may be a line they are writing just now
                _repair(torn)
                notes.append(str(torn))
        number = max((part.number for part in records.parts(path) if part.process == process), default=0) + 1
        remote = is_remote(path)
        writer = RemoteParts(path, process, number) if remote else LocalPart(part_path(path, process, number))
        stack.callback(writer.close)
        yield Output(path, config, config_hash, process, processes, found.records, tuple(notes), writer)


def writable(folder: str | os.PathLike[str]) -> epath.Path:
    """Raise `InputError` unless this is a folder, or can become one."""
    scheme, colon, _ = os.fspath(folder).partition("://")
    if colon and scheme not in REMOTE:
        raise InputError(f"cannot write to {folder}: a folder is on a disk, gs:// or s3://")
    path = epath.Path(folder)
    try:
        is_file = path.exists() and not path.is_dir()
    except ImportError as error:  # the library behind gs:// or s3:// is an extra
        raise InputError(f"cannot write to {folder}: {error} (pip install 'fastkv-jax[gcs]')") from error
    if is_file:
        raise InputError(f"cannot write to {folder}: it is a file; give a folder")
    return path


def check_output(folder: str | os.PathLike[str]) -> epath.Path:
    """Raise `InputError` unless records can go there: nothing is there yet, an empty folder, or a run's folder."""
    path = writable(folder)
    names = [held.name for held in inside(path)] if path.is_dir() else []
    strange = [name for name in names if not name.startswith(SCRATCH)]
    if strange and RUN not in names:
        raise InputError(f"{folder} holds {strange[0]} but no {RUN}, so it is no run's folder; give a new one")
    return path


def write_whole(path: epath.Path, content: bytes) -> None:
    """A file that is whole or not there; raises `OSError` naming it."""
    if is_remote(path):
        path.write_bytes(content)
        return
    try:
        with files.replacing(path) as scratch, scratch.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def versions() -> dict[str, str]:
    """Of Python and of the packages a score may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    return found


def _claim(
    path: epath.Path, config: Mapping[str, Any], config_hash: str, overwrite: bool, process: int, processes: int
) -> list[str]:
    """Write run.json, or compare it; returns notes."""
    now, there = versions(), records.read_run(path)
    if there is not None and there["config_hash"] != config_hash:
        differences = _differences(there.get("config"), config)
        if not overwrite:
            raise InputError(
                f"{path} is of another configuration ({differences}); give --overwrite to remove its results, "
                "or choose another folder"
            )
        _remove_run(path, process, processes)
        there = None
    if there is not None:
        changed = _differences(there.get("versions"), now)
        return [f"resuming a run that other versions began: {changed}"] if changed else []
    content = {"format": FORMAT, "config_hash": config_hash, "config": config, "versions": now}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path / RUN, text.encode())
    return []


def _differences(before: Any, now: Mapping[str, Any], most: int = 4) -> str:
    old = before if isinstance(before, dict) else {}
    keys = [key for key in {**old, **now} if old.get(key) != now.get(key)]
    named = [f"{key} {_short(old.get(key))} there, {_short(now.get(key))} here" for key in keys[:most]]
    return "; ".join([*named, *(["..."] if len(keys) > most else [])])


def _short(value: Any, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[:most] + "..."


def _remove_run(path: epath.Path, process: int, processes: int) -> None:
    for other in range(processes):
        if other != process:
            with locks.held(path, other, processes):
                pass  # or it is refused: that process writes what is to be removed
    for name in (RESULTS, SAMPLES):
        (path / name).unlink(missing_ok=True)
    for part in records.parts(path):
        part.path.unlink()
    (path / RUN).unlink()  # last: if this is interrupted, the rest is still known as that run's


def _repair(torn: Torn) -> None:
    if is_remote(torn.part.path):
        torn.part.path.write_bytes(torn.part.path.read_bytes()[: torn.whole])
    else:
        os.truncate(torn.part.path, torn.whole)
