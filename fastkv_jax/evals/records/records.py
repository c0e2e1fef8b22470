"""The records of an evaluation: one JSON object a line in numbered part files, and how they are read back.

A run's folder, on a disk or on gs://, holds

    run.json                        what was run: config, its hash, versions
    samples.json                    [task, id] of every sample, in order
    part-<process>-<number>.jsonl   records, in the order they were made; a process that resumes begins a new part
    results.jsonl                   all records in the samples' order; there when all are
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from fastkv_jax.errors import InputError
from fastkv_jax.evals.records.paths import inside

Key = tuple[str, str]  # task and id of a sample
Record = dict[str, Any]

RUN, SAMPLES, RESULTS = "run.json", "samples.json", "results.jsonl"
FORMAT = "fastkv_jax evaluation"
PART = re.compile(r"part-(\d+)-(\d+)\.jsonl")


class Part(NamedTuple):
    """A file of records, named by its path; sorts by process, then number."""

    process: int
    number: int
    path: epath.Path


class Torn(NamedTuple):
    """The last line of a process's newest part, cut while it was written."""

    part: Part
    line: int  # from 1
    whole: int  # bytes before it

    def __str__(self) -> str:
        return f"{self.part.path}, line {self.line}, was cut while it was written; its sample is answered again"


@dataclass(frozen=True)
class Found:
    """What the parts of a folder hold."""

    records: dict[Key, Record]
    torn: tuple[Torn, ...]


def merged(folder: str | os.PathLike[str]) -> list[Record]:
    """All records of all processes in the samples' order; raises `InputError` if some are missing or damaged."""
    path = epath.Path(folder)
    run = read_run(path)
    order = read_samples(path)
    if run is None or order is None:
        raise InputError(f"{folder} holds no evaluation: there is no {RUN if run is None else SAMPLES}")
    records = load(path, run["config_hash"]).records
    if missing := sum(key not in records for key in order):
        raise InputError(f"{folder}: {missing} of {len(order)} samples have no record yet; run it again to resume")
    return [records[key] for key in order]


def load(folder: epath.Path, config_hash: str) -> Found:
    """Every record of every process, without a cut last line.

    Raises `InputError`, with file and line, for a damaged line elsewhere, a record of another configuration and a
    second record of a sample.
    """
    records: dict[Key, Record] = {}
    torn: list[Torn] = []
    found = parts(folder)
    newest = {part.process: part.number for part in found}
    for part in found:
        data, start = part.path.read_bytes(), 0
        for number, line in enumerate(io.BytesIO(data), 1):
            try:
                record = _parse(line)
            except ValueError as error:
                if start + len(line) == len(data) and part.number == newest[part.process]:
                    torn.append(Torn(part, number, start))
                    break
                raise InputError(f"{part.path}, line {number}, is damaged ({error}); repair or remove it") from error
            key = _key(record, config_hash, f"{part.path}, line {number}")
            if key in records:
                raise InputError(f"{part.path}, line {number}: a second record of {' '.join(key)}")
            records[key] = record
            start += len(line)
    return Found(records, tuple(torn))


def parts(folder: epath.Path) -> list[Part]:
    """By process and number."""
    matches = [(PART.fullmatch(path.name), path) for path in inside(folder)]
    return sorted(Part(int(match[1]), int(match[2]), path) for match, path in matches if match)


def _parse(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        raise ValueError("no end of line")
    return json.loads(line.decode(), parse_constant=_refuse)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _key(record: Any, config_hash: str, where: str) -> Key:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("task", "id")):
        raise InputError(f"{where}, is no record: it has no task and id")
    if record.get("config_hash") != config_hash:
        raise InputError(f"{where}, is a record of another configuration ({record.get('config_hash')})")
    return record["task"], record["id"]


def as_line(record: Mapping[str, Any]) -> bytes:
    """JSON and the end of the line; raises `ValueError` naming the sample for NaN, infinity and what JSON lacks."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (ValueError, TypeError) as error:
        raise ValueError(f"the record of {record.get('task')} {record.get('id')} is not JSON: {error}") from error


def hash_of(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_run(folder: epath.Path) -> dict[str, Any] | None:
    """run.json; None if there is none. Raises `InputError` if it is not ours."""
    run = _read_json(folder / RUN)
    if run is None:
        return None
    if not isinstance(run, dict) or run.get("format") != FORMAT or not isinstance(run.get("config_hash"), str):
        raise InputError(f"{folder / RUN} is damaged, or not of an evaluation; choose another folder")
    return run


def read_samples(folder: epath.Path) -> list[Key] | None:
    """The samples in order; None if none were written down."""
    given = _read_json(folder / SAMPLES)
    if given is None:
        return None
    if not isinstance(given, list) or not all(_is_key(key) for key in given):
        raise InputError(f"{folder / SAMPLES} is damaged; it should be a list of [task, id]")
    return [(task, identity) for task, identity in given]


def _is_key(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) == 2 and all(isinstance(name, str) for name in given)


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
