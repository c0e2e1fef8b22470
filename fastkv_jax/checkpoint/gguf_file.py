"""The header of a GGUF file: metadata and a table of tensors, with every read bounded by the file's size.

`gguf.GGUFReader` reads the same in 20 times the time (a 49k vocabulary: 2.1 s) and loops on corrupt lengths.
Source: the GGUF specification in ggml's docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fastkv_jax.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor's bytes are, and what they mean; `shape` has the slowest axis first, as NumPy does."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file: its metadata, its tensors by name, and the memory map behind them."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    data: mmap.mmap

    def rows(self, tensor: GGUFTensor, first: int, last: int) -> np.ndarray:
        """Rows [first, last) dequantised to float32; a vector is one row."""
        start = tensor.offset + first * tensor.row_bytes
        raw = np.frombuffer(self.data, np.uint8, (last - first) * tensor.row_bytes, start)
        return dequantize(raw.reshape(last - first, tensor.row_bytes), tensor.kind)


def open_gguf(path: Path) -> GGUFFile:
    """Read the header. Raises `CheckpointError` naming the file if it is not GGUF, truncated, corrupt or split."""
    try:
        stamp = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return _open(path, stamp.st_ino, stamp.st_size, stamp.st_mtime_ns)


@lru_cache(maxsize=1)  # configuration, tokenizer and weights come from one file, whose header has every token in it
def _open(path: Path, *_: int) -> GGUFFile:
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
    if (parts := metadata.get("split.count", 1)) > 1:
        raise CheckpointError(f"{path} is one of {parts} parts; join them first with llama.cpp's llama-gguf-split")
    return GGUFFile(path, metadata, tensors, data)


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

    def entry(self, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.fail(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        kind = self.scalar("I")
        return _supported(self.path, name, kind), shape, self.scalar("Q")

    def tensor(
        self, name: str, base: int, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int
    ) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.fail(f"tensor {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {block}")
        row_bytes = shape[-1] // block * block_bytes
        end = base + offset + math.prod(shape[:-1]) * row_bytes
        if end > len(self.data):
            raise self.fail(f"tensor {name} ends at byte {end}, the file at {len(self.data)}")
        return GGUFTensor(kind, shape, base + offset, row_bytes)


def _supported(path: Path, name: str, number: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(number)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError):
        label = GGMLQuantizationType._value2member_map_.get(number)
        raise CheckpointError(
            f"{path}: tensor {name} has quantisation type {number if label is None else label.name},"
            " which is not supported; requantise it, for example to Q8_0 or F16"
        ) from None
    return kind
