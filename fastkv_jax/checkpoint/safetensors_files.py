"""Which tensors a folder of safetensors files holds, and where: every header checked before anything is trusted.

The format: 8 bytes of header length, a JSON header, then the data. Source: the README of safetensors, section "Format".
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fastkv_jax.checkpoint.assemble import listed
from fastkv_jax.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model"  # how names begin of what is to be added to a model's weights
MAX_HEADER_BYTES = 100_000_000
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F4", "I4", "U4"), 4),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a header: the file that holds it, its dtype by safetensors' name, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder by name. Reads headers only. Raises `CheckpointError` naming file and reason."""
    names = sorted(path.name for path in folder.iterdir())
    if INDEX in names:
        tensors = _read_shards(folder, folder / INDEX)
        _check_alone(folder, names, INDEX, {tensor.file.name for tensor in tensors.values()})
        return tensors
    if SINGLE in names:
        _check_alone(folder, names, SINGLE, {SINGLE})
        _check_inside(folder, SINGLE)
        return read_header(folder / SINGLE)
    files = [name for name in names if name.endswith(".safetensors")]
    loose = [name for name in files if not name.startswith(ADAPTER)]
    if files and not loose:
        raise CheckpointError(f"{folder}: only an adapter ({listed(files)}), no model; merge it into its model first")
    if len(loose) == 1:
        _check_inside(folder, loose[0])
        return read_header(folder / loose[0])
    if loose:
        raise CheckpointError(f"{folder}: {len(loose)} safetensors files but no {INDEX}; it is needed to join them")
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        raise CheckpointError(
            f"{folder}: only pickled weights ({listed(pickled)}), which can run code and are never opened;"
            " convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: no weights; expected {SINGLE} or {INDEX}")


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, from its header. Raises `CheckpointError` unless the header describes the whole file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            reason = "header too large" if length > MAX_HEADER_BYTES else "file too short"
            raise CheckpointError(f"{file} is not a valid safetensors file ({reason}).{_diagnosis(start)}")
        stream.seek(8)
        header = parse_json(stream.read(length), file)
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _read_entry(file, name, entry)
        spans.append((*span, name))
    _check_cover(file, spans, size - 8 - length)
    return tensors


def parse_json(data: bytes, file: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys, else `CheckpointError` naming the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(f"{file}: duplicate key {next(n for n in names if names.count(n) > 1)!r}")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} does not hold valid JSON ({error}).{_diagnosis(data[:64])}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def open_tensors(tensors: Iterable[Tensor], stack: ExitStack) -> Callable[[Tensor, str], np.ndarray]:
    """A function that reads one tensor, given its record and its name. The files stay open as long as `stack`."""
    files = {tensor.file for tensor in tensors}
    try:
        handles = {file: stack.enter_context(safe_open(file, framework="np")) for file in sorted(files)}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot open {', '.join(map(str, sorted(files)))}: {error}") from error

    def read(tensor: Tensor, name: str) -> np.ndarray:
        try:
            return handles[tensor.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{tensor.file}: cannot read tensor {name}: {error}") from error

    return read


def _read_entry(file: Path, name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: tensor {name} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _BITS:
        raise CheckpointError(f"{file}: tensor {name} has unknown dtype {dtype!r}")
    if not naturals(shape) or not naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}")
    first, last = offsets
    needed = math.prod(shape) * _BITS[dtype]
    if (last - first) * 8 != needed:
        raise CheckpointError(
            f"{file}: tensor {name} ({dtype} {shape}) needs {needed // 8} bytes, data_offsets give {last - first}"
        )
    return Tensor(file, dtype, tuple(shape)), (first, last)


def _check_cover(file: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The data must be covered exactly: a hole can hide bytes, an overlap can alias tensors."""
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            kind = "overlaps the tensor before it" if first < end else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {name} at byte {first} {kind} (which ends at {end})")
        end = last
    if end > size:
        raise CheckpointError(f"{file} is truncated: its header describes {end} bytes of data, {size} exist")
    if end < size:
        raise CheckpointError(f"{file} has {size - end} trailing bytes that its header does not describe")


def _diagnosis(start: bytes) -> str:
    """What a file that is not a safetensors file looks like, from its first 64 bytes; starts with a space, or empty."""
    text = start.lstrip().lower()
    if not start:
        return " It is empty: the download was probably interrupted"
    if start.startswith(b"version https://git-lfs"):
        return " It looks like a Git-LFS pointer: run 'git lfs pull'"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return " It looks like a web page: the download probably needs a login"
    if start.startswith(b"PK") or (start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return " It looks like a pickle, which can run code and is never opened"
    if start.startswith(b"GGUF"):
        return " It looks like a GGUF file: name it .gguf and pass its path"
    return ""


def _check_alone(folder: Path, names: list[str], chosen: str, used: set[str]) -> None:
    """Two sets of weights in a folder: nobody can tell which is meant, so neither is read."""
    others = [name for name in names if (name == SINGLE or _SHARD.fullmatch(name)) and name not in used]
    if others:
        raise CheckpointError(
            f"{folder} holds two sets of weights: {chosen} ({listed(sorted(used))}) and {listed(others)};"
            " remove the one that is not meant"
        )


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    _check_inside(folder, index.name)
    weight_map = parse_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be a non-empty object")
    for tensor, name in weight_map.items():
        _check_name(index, tensor, name)
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        _check_inside(folder, name)
        for tensor, record in read_header(folder / name).items():
            if tensor in tensors:
                raise CheckpointError(f"{folder}: tensor {tensor} is in both {tensors[tensor].file.name} and {name}")
            tensors[tensor] = record
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise CheckpointError(f"{index}: tensor {tensor} is listed in {name}, which does not hold it")
    return tensors


def _check_name(index: Path, tensor: str, name: Any) -> None:
    plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")
    if not plain or name.startswith("."):
        raise CheckpointError(f"{index}: {tensor} is in {name!r}; allowed: a plain file name ending .safetensors")


def _check_inside(folder: Path, name: str) -> None:
    """Refuse a link that leaves the folder, except into the blobs/ of the Hub cache that the folder belongs to."""
    home, target = folder.resolve(), (folder / name).resolve()
    allowed = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{folder / name} is a link to {target}, outside the model folder; copy the file instead")
