"""The kernels go through the compilers of real chips, which refuse what does not fit; nothing is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_tpu.py")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # libtpu compiles, and looks for no chip
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes at a time
    "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
}


@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_kernel_compiles_for_a_tpu(target: str):
    run = subprocess.run(
        [sys.executable, SCRIPT, target], env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, f"{run.stderr[-3000:]}\nlibtpu is part of the extra 'test'"
    programs = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(programs) == 29
    for program in programs:
        name = program["program"].split()[0]
        calls = 2 if name == "decode_attention" and "C=0" not in program["program"] else 1
        assert program["calls"] == [name] * calls, program
        assert program["sorts"] == 0, program
        if "D=128" in program["program"]:  # keys and values are read where they are, not copied first
            assert program["temporaries"] <= 0.1 * program["arguments"], program
