"""Samples from files of JSON lines, on disk or on gs://. Whatever is wrong is named with file, line and field."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from fastkv_jax.errors import InputError
from fastkv_jax.json_lines import values

Check = Callable[[Any], bool]
IS: Mapping[str, Check] = {
    "text": lambda value: isinstance(value, str),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a list of texts, not empty": lambda value: bool(value) and _texts(value),
    "null or a list of texts": lambda value: value is None or _texts(value),
    "text or a whole number": lambda value: isinstance(value, str | int) and not isinstance(value, bool),
}  # what a field may hold


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read(path: str | os.PathLike[str], fields: Mapping[str, str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line; `fields` says what each must hold, in the words of `IS`.

    Empty lines are passed over. Raises `InputError`.
    """
    try:
        rows = [(number, _row(f"{path}, line {number}", row, fields)) for number, row in values(_text(path))]
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise InputError(f"{where}: not whole JSON ({error.msg} at column {error.colno})") from error
    if not rows:
        raise InputError(f"{path}: the file holds no samples")
    return rows


def _row(where: str, row: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise InputError(f"{where}: there is no field {name!r}")
        if not IS[kind](row[name]):
            raise InputError(f"{where}: field {name!r} must be {kind}, got {_short(row[name])}")
    return row


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return epath.Path(path).read_text(encoding="utf-8")
    except ImportError as error:  # what reads gs:// is an extra
        raise InputError(f"{path} needs another package: pip install 'fastkv-jax[gcs]' ({error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start:,}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
