"""A step in a process of its own: what it says is heard as it comes, and how it ends is a row."""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

from fastkv_jax import json_lines
from fastkv_jax.device_checks.results import DIED, LATE, Row
from fastkv_jax.errors import Terminated

HANGS = 0.5  # of a step's time: a check that takes more has hung, others were only too many
GRACE = 2.0  # seconds between asking a process to end and ending it
TRACE = re.compile(
    r"\s*(@ |\*\*\*|#\d|File \"|Fatal Python error|Current thread|Thread 0x|Extension modules|<no Python)"
)


class Clock:
    """How many seconds are left of so many."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Negative when they are over."""
        return self._end - time.monotonic()


def rows(step: str, words: list[str], seconds: float, *, verbose: bool) -> Iterator[Row]:
    """Of one step. When its process dies within a check, that is its row, and a new process goes on with the next."""
    clock, done = Clock(seconds), 0
    while True:
        before, begun, since = done, "", time.monotonic()
        with tempfile.TemporaryFile() as errors, _started([*words, "--done", str(done)], errors) as process:
            try:
                for line in _said(process, clock):
                    if "begins" in line:
                        begun, done, since = line["begins"], done + 1, time.monotonic()
                    else:
                        begun = ""
                        yield Row(**line)
                code = process.wait(max(clock.left(), 0))
            except subprocess.TimeoutExpired:
                code = None
            _end(process)
            said = _text(errors)
        if verbose:
            sys.stderr.write(said)
        if code == 0:
            return
        took = time.monotonic() - since
        row = _last_row(code, said, seconds, hung=not begun or took > HANGS * seconds)
        yield replace(row, step=step, check=begun, seconds=took)
        if code is None or done == before:  # no time left, or it would die again before its first check
            return


@contextlib.contextmanager
def _started(words: list[str], errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that Ctrl-C reaches us alone; gone when the block ends, however that happens."""
    command = [sys.executable, "-m", "fastkv_jax", *words]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout:  # not the process: one that hangs in a driver would be waited for without end
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With whatever it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _said(process: subprocess.Popen[bytes], clock: Clock) -> Iterator[dict[str, Any]]:
    """JSON objects, a line each, until there are no more; raises `subprocess.TimeoutExpired` when the time is over."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not waiting.select(max(clock.left(), 0)):
                raise subprocess.TimeoutExpired(process.args, 0)
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield from (value for _, value in json_lines.values(line.decode()))


def _last_row(code: int | None, said: str, seconds: float, hung: bool) -> Row:
    """How a process ended: by its time, which is a fault if a check hung; by a signal; by itself."""
    if code is None:
        told = f"not done within {seconds:,.0f} s"
        return Row("", "", DIED if hung else LATE, told, {"exit_code": None}, details=said[-4000:])
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    else:
        how = ""
    reason = last_words(said)
    told = "; ".join(word for word in (how, reason) if word) or f"exit code {code}"
    return Row("", "", DIED, told, {"exit_code": code}, details=said[-4000:])


def last_words(said: str) -> str:
    """The last line of stderr that says something, without what only locates it."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not TRACE.match(line)]
    return lines[-1].removeprefix("error: ")[:300] if lines else ""


def _text(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read().decode(errors="replace")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the run like an exception, so that what is done is written."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
