"""What one process takes, seen from outside: seconds to its first word, and the peak of its memory."""

import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from fastkv_jax.errors import BackendError

KIB = 1 if sys.platform == "darwin" else 1024  # what a process's peak memory is counted in
# A process begins with the peak of the one that started it, so that a small one must stand between.
STARTER = """
import os, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
os.write(int(sys.argv[1]), str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss).encode())
sys.exit(code)
"""


class Waited(NamedTuple):
    """For one process."""

    first: float  # seconds to the first character on stdout
    whole: float
    peak: int  # bytes
    out: str  # what it printed


def wait_for(words: list[str]) -> Waited:
    """Run `python -m fastkv_jax` with these words. Raises `BackendError` with its last line if it fails."""
    command = [sys.executable, "-m", "fastkv_jax", *words]
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as peak:
        began = time.perf_counter()
        start = [sys.executable, "-S", "-E", "-c", STARTER, str(peak.fileno()), *command]
        with subprocess.Popen(
            start, stdout=subprocess.PIPE, stderr=errors, pass_fds=[peak.fileno()], text=True
        ) as process:
            assert process.stdout is not None
            out = process.stdout.read(1)
            first = time.perf_counter() - began
            out += process.stdout.read()
        whole = time.perf_counter() - began
        errors.seek(0)
        peak.seek(0)
        if process.returncode:
            said = errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise BackendError(f"{' '.join(words[:1])}: {said[-1].removeprefix('error: ')}")
        return Waited(first, whole, int(peak.read()) * KIB, out)
