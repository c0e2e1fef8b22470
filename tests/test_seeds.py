"""Seeds: 32 bits, and the scripts that make texts say so."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals.texts import needles
from fastkv_jax.seeds import check_seed

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_a_seed(seed):
    check_seed(seed)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_no_seed(seed):
    for use in (check_seed, lambda s: needles.make(1, 200, 200, s)):
        with pytest.raises(FastKVConfigError, match=rf"seed must be in 0 ... 2\*\*32 - 1, got {seed}"):
            use(seed)


@pytest.mark.parametrize("command", ["needles.py make", "make_document.py"])
def test_scripts(command):
    name, *words = command.split()
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *words, "--seed", "-1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "seed must be in 0 ... 2**32 - 1, got -1" in done.stderr.splitlines()[-1]
