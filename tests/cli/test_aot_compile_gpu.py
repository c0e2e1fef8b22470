"""Decode loops through the compiler for GPUs that are not here, in an environment with the extra gpu-compiler.

It stands apart from the other tests, which JAX's plugin for GPUs, without the libraries it asks for, would disturb.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu_compiler
SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_compile.py"
LAYERS = 32


def compiled(*words: str) -> dict:
    command = [sys.executable, SCRIPT, "--target", "h200", "--only", "decode", "--json", *words]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["decode"]


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "full", "--tokens", "131072"),
        ("--method", "fastkv", "--tokens", "131072"),
        ("--method", "fastkv", "--tokens", "131072", "--kv-dtype", "int8"),
        ("--method", "full", "--tokens", "131072", "--kv-dtype", "float8_e4m3fn"),  # 2^32 entries: in two runs
        ("--method", "adakv", "--tokens", "32768"),  # flat
    ],
    ids=" ".join,
)
def test_a_step_is_few_launches_copies_nothing_and_asks_the_host_nothing(words: tuple[str, ...]):
    found = compiled(*words)
    assert found["launches_a_layer"] <= 10
    assert found["launches"] <= 10 * LAYERS
    assert found["large_copies"] == found["host_trips"] == 0
    assert found["hbm_bytes_temp"] < 16 << 20
