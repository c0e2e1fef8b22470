"""What people and machines see: rows of a table as they come, a line at the end, and JSON."""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

import fastkv_jax
from fastkv_jax.device_checks.results import FAULTS, GAPS, MEASURED, RIGHT, Row
from fastkv_jax.errors import InputError
from fastkv_jax.files import check_target, replacing

HEAD = ("step", "check", "result", "found", "s")


class Report:
    """A context that tells what there is when it ends, whatever ends it.

    Raises `InputError` if `path` cannot be written.
    """

    def __init__(self, path: str | None, *, quick: bool, as_json: bool, quiet: bool):
        self._path, self._quick, self._json, self._quiet = path, quick, as_json, quiet
        self._rows: list[Row] = []
        self._began, self._complete = time.monotonic(), False
        self._bar: Any = None
        if path is not None:
            check_target(path)
        try:
            self._write()
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def __enter__(self) -> "Report":
        self._bar = tqdm(desc="checks", unit=" checks", file=sys.stderr, disable=self._quiet, leave=False)
        self._print(f"| {' | '.join(HEAD)} |\n|---|---|---|---|--:|")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.close()
        self._complete = kind is None
        self._write()
        if kind is BrokenPipeError:
            return
        if self._json:
            print(json.dumps(self.as_json()))
        else:
            print(f"\n{summary(self._rows)}{'' if self._complete else '; not complete'}")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Rows of one step come within; it is in the file when the block ends."""
        self._bar.set_description(name)
        yield
        self._write()

    def add(self, row: Row) -> None:
        """One more row."""
        self._rows.append(row)
        self._bar.update()
        self._print(line(row))

    @property
    def answered(self) -> bool:
        """Whether a step has found a device."""
        return any("exit_code" not in row.numbers for row in self._rows)

    def count(self, *status: str) -> int:
        """Rows of these statuses."""
        return sum(row.status in status for row in self._rows)

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        counts = Counter(row.status for row in self._rows)
        return {
            "fastkv_jax": fastkv_jax.__version__, "quick": self._quick, "complete": self._complete,
            "seconds": time.monotonic() - self._began, "counts": dict(counts), "right": not self.count(*FAULTS),
            "rows": [asdict(row) for row in self._rows],
        }  # fmt: skip

    def _write(self) -> None:
        if self._path is not None:
            with replacing(self._path) as scratch:
                scratch.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    def _print(self, text: str) -> None:
        if not self._json:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)


def line(row: Row) -> str:
    """A row of the table in Markdown; what is no fact of a check stands out."""
    status = f"**{row.status}**" if row.status in FAULTS else row.status
    cells = (row.step, row.check or "(the step)", status, row.found, f"{row.seconds:.1f}")
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def summary(rows: list[Row]) -> str:
    """How many of each, and by name what is wrong or was not checked."""
    counts = Counter(row.status for row in rows)
    told = [f"{counts[status]} {status}" for status in (RIGHT, MEASURED, *FAULTS)]
    for status in (*FAULTS, *GAPS):
        names = [f"{row.step}: {row.check}" if row.check else row.step for row in rows if row.status == status]
        if names:
            told.append(
                f"{len(names)} {status} ({'; '.join(names)})" if status in GAPS else f"{status}: {'; '.join(names)}"
            )
    return ", ".join(told[: 2 + len(FAULTS)]) + "".join(f"\n{more}" for more in told[2 + len(FAULTS) :])
