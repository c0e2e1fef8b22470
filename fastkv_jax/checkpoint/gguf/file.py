"""The header of a GGUF file: metadata and a table of tensors, with every read bounded by the file's size.

A model in parts, NAME-00001-of-00003.gguf and so on, is one model: the first part has the metadata.

`gguf.GGUFReader` reads the same in 20 times the time (a 49k vocabulary: 2.1 s) and loops on corrupt lengths.
Source: the GGUF specification in ggml's docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv_jax.checkpoint.assemble import listed
from fastkv_jax.checkpoint.gguf.keys import check_types
from fastkv_jax.errors import CheckpointError

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
PIECE = re.compile(r"(?P<whole>.+\.gguf)[-._](split|part|chunk)?[-._]?(a?[a-z]|\d{1,4})([-_]?of[-_]?\d+)?", re.I)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor's bytes are, and what they mean; `shape` has the slowest axis first, as NumPy does."""

    kind: "GGMLQuantizationType"
    shape: tuple[int, ...]
    offset: int
    row_bytes: int
    data: mmap.mmap  # of the part that holds it


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF model: the metadata of its first or only part, and the tensors of all by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def rows(self, tensor: GGUFTensor, first: int, last: int) -> np.ndarray:
        """Rows [first, last) dequantised to float32; a vector is one row."""
        start = tensor.offset + first * tensor.row_bytes
        raw = np.frombuffer(tensor.data, np.uint8, (last - first) * tensor.row_bytes, start)
        return package().quants.dequantize(raw.reshape(last - first, tensor.row_bytes), tensor.kind)


def open_gguf(path: Path) -> GGUFFile:
    """Read the headers of a file and, if it is one of several parts, of those beside it; any part will do.

    Raises `CheckpointError` naming the file if it is not GGUF, truncated or corrupt, or if a part is missing.
    """
    paths = _parts(path)
    stamps = []
    for part in paths:
        try:
            stamp = part.stat()
        except OSError as error:
            raise CheckpointError(f"cannot read {part}: {error.strerror}") from error
        stamps.append((stamp.st_ino, stamp.st_size, stamp.st_mtime_ns))
    return _open(tuple(paths), tuple(stamps))


def package() -> ModuleType:
    """The gguf package, which knows the formats of quantised blocks."""
    try:
        import gguf.constants
        import gguf.quants
    except ImportError as error:
        raise CheckpointError(f"GGUF files are read with the package gguf: pip install gguf ({error})") from error
    return gguf


def _parts(path: Path) -> list[Path]:
    """All parts of the model, in order."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(f"{match['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(f"{path} is one of {count} parts, of which {listed(missing)} is not beside it")
    return paths


@lru_cache(maxsize=1)  # configuration, tokenizer and weights come from one file, whose header has every token in it
def _open(paths: tuple[Path, ...], _: tuple[tuple[int, ...], ...]) -> GGUFFile:
    first, tensors = _read(paths[0])
    for number, path in enumerate(paths):
        metadata, found = (first, tensors) if number == 0 else _read(path)
        count, own = metadata.get("split.count", 1), metadata.get("split.no", 0)
        if max(count, 1) != len(paths) or own != number:
            raise CheckpointError(
                f"{path} is one of {count} parts, number {own + 1}, but its name says {number + 1} of {len(paths)};"
                " give the parts their own names back, NAME-00001-of-00002.gguf and so on"
            )
        if twice := sorted(found.keys() & tensors.keys()) if number else []:
            raise CheckpointError(f"{path}: {listed(twice)} is in an earlier part, too")
        tensors = tensors | found
    declared = first.get("split.tensors.count", len(tensors))
    if declared != len(tensors):
        raise CheckpointError(f"{paths[0]} and its parts hold {len(tensors)} tensors, {declared} are declared")
    return GGUFFile(paths[0], first, tensors)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    try:
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(f"{path} is empty: the download was probably interrupted") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if data[:4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file (it starts with {data[:4]!r}, not b'GGUF')")
    try:
        metadata, tensors = _Cursor(path, data).header()
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: its header cannot be read ({error})") from None
    check_types(metadata, path)
    return metadata, tensors


class _Cursor:
    """Reads forward through the header; `struct` refuses to read past the end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or corrupt: {reason}")

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise self.fail(f"a string of {length} bytes at byte {self.at}")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def array(self) -> list[Any]:
        kind, length = self.scalar("I"), self.scalar("Q")
        code = _SCALARS.get(kind)
        if kind != _STRING and code is None:
            raise self.fail(f"an array of value type {kind} at byte {self.at}")
        if length * (8 if code is None else struct.calcsize(code)) > len(self.data) - self.at:
            raise self.fail(f"an array of {length} values at byte {self.at}")
        if code is None:
            return [self.string() for _ in range(length)]
        values = struct.unpack_from(f"<{length}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{length}{code}")
        return list(values)

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"value type {kind} at byte {self.at}")
        return self.scalar(_SCALARS[kind])

    def header(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} has GGUF version {version}; supported: 2 and 3, little-endian")
        tensor_count, value_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string()
            if key in metadata:
                raise self.fail(f"metadata key {key!r} appears twice")
            metadata[key] = self.value()
        entries: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            name = self.string()
            if name in entries:
                raise self.fail(f"tensor {name} appears twice")
            entries[name] = self.entry(name)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        base = -(-self.at // alignment) * alignment
        return metadata, {name: self.tensor(name, base, *entry) for name, entry in entries.items()}

    def entry(self, name: str) -> "tuple[GGMLQuantizationType, tuple[int, ...], int]":
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.fail(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        kind = self.scalar("I")
        return _supported(self.path, name, kind), shape, self.scalar("Q")

    def tensor(
        self, name: str, base: int, kind: "GGMLQuantizationType", shape: tuple[int, ...], offset: int
    ) -> GGUFTensor:
        block, block_bytes = package().GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.fail(f"tensor {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {block}")
        row_bytes = shape[-1] // block * block_bytes
        end = base + offset + math.prod(shape[:-1]) * row_bytes
        if end > len(self.data):
            raise self.fail(f"tensor {name} ends at byte {end}, the file at {len(self.data)}")
        return GGUFTensor(kind, shape, base + offset, row_bytes, self.data)


def _supported(path: Path, name: str, number: int) -> "GGMLQuantizationType":
    gguf = package()
    try:
        kind = gguf.GGMLQuantizationType(number)
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError):
        label = gguf.GGMLQuantizationType._value2member_map_.get(number)
        raise CheckpointError(
            f"{path}: tensor {name} has quantisation type {number if label is None else label.name},"
            " which is not supported; requantise it, for example to Q8_0 or F16"
        ) from None
    return kind
