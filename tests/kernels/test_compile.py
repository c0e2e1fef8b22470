"""Kernels, and a prompt over several chips, go through real chips' compilers, which refuse what does not fit.

Nothing is run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
ENVIRONMENT = {  # beside conftest.py's, which keeps libtpu from looking for a chip
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes at a time
    "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]),
}


def programs_of(script: str, target: str) -> list[dict[str, Any]]:
    words = [sys.executable, FOLDER / script, target]
    run = subprocess.run(words, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"{run.stderr[-3000:]}\nlibtpu is part of the extra 'test'"
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    "target",
    [
        "v5e:2x2",
        "tpu7x:2x2x1",
        pytest.param("v5p:2x2x1", marks=pytest.mark.all_generations),
        pytest.param("v6e:2x2", marks=pytest.mark.all_generations),
    ],
)
def test_every_kernel_compiles_for_a_tpu(target: str):
    programs = programs_of("compile_for_tpu.py", target)
    assert len(programs) == 29
    for program in programs:
        name = program["program"].split()[0]
        calls = 2 if name == "decode_attention" and "C=0" not in program["program"] else 1
        assert program["calls"] == [name] * calls, program
        assert program["sorts"] == 0, program
        if "D=128" in program["program"]:  # keys and values are read where they are, not copied first
            assert program["temporaries"] <= 0.1 * program["arguments"], program


def test_a_prompt_spread_over_four_chips_takes_less_than_half_the_memory_of_each():
    one, four = programs_of("compile_prefill_for_tpu.py", "v5e:2x2")
    attention = "splash_mha_fwd_segmented_no_residuals"
    assert one["calls"].count(attention) == 2  # before TSP and after it
    assert four["calls"].count(attention) == 2 * 4  # each with the mask of one chip's queries
    assert set(one["calls"]) == set(four["calls"]) == {attention, "window_scores", "select"}
    assert 2 * four["temporaries"] < one["temporaries"]
