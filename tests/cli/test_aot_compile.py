"""Whole prefills and decode steps through the compilers of TPUs that are not here."""

import functools
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fastkv_jax.cli import aot_compile
from kernels_pallas import linear

MAIN = ("v5e-8", "tpu7x-8")  # the least memory, and the newest
# Less effort of the compiler takes half the time; what it makes of the same kernels and loops is looked at in either.
QUICKLY, AS_USUAL = "O1", None
EVERY = [(target, QUICKLY) if target in MAIN else pytest.param(target, QUICKLY, marks=pytest.mark.all_generations)
         for target in aot_compile.TPU_TARGETS]  # fmt: skip
EVERY += [pytest.param(target, AS_USUAL, marks=pytest.mark.all_generations) for target in aot_compile.TPU_TARGETS]
SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_compile.py"


@cache
def compiled(target: str, method: str, *flags: str, effort: str | None) -> dict:
    """What the command prints last, in a process of its own: it changes the platform."""
    words = ["--target", target, "--method", method, *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    environment |= {"JAX_OPTIMIZATION_LEVEL": effort} if effort else {}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("target", "effort"), EVERY)
def test_llama_8b_at_32k_compiles_for_every_tpu(target: str, effort: str | None):
    found = compiled(target, "fastkv", "--tokens", "32768", effort=effort)
    assert {"window_scores", "select"} <= set(found["kernels"]) and "decode_attention" in found["decode"]["kernels"]
    assert found["hbm_bytes_args"] + found["hbm_bytes_temp"] < 16e9  # the smallest of them, v5e
    weights_in_its_own_tiling = 3.6e9 if target == "tpu7x-8" else 0  # it copies them at each call; docs/kernels.md
    assert found["decode"]["hbm_bytes_temp"] < 0.1e9 + weights_in_its_own_tiling
    assert found["sorts"] == found["decode"]["sorts"] == 0


@pytest.mark.parametrize("effort", [QUICKLY, pytest.param(AS_USUAL, marks=pytest.mark.all_generations)])
def test_at_131072_tokens_it_takes_no_more_memory_than_full_context(effort: str | None):
    full, fast = (compiled("v5e-8", method, "--tokens", "131072", effort=effort) for method in ("full", "fastkv"))
    assert fast["hbm_bytes_temp"] <= full["hbm_bytes_temp"]


def test_the_compiled_loops_do_no_more_work_than_the_arithmetic_says():
    full, fast = (compiled("v5e-8", method, "--tokens", "131072", effort=QUICKLY) for method in ("full", "fastkv"))
    for found in (full, fast):
        assert found["compiled_flops"] == pytest.approx(found["flops"] / 8, rel=0.02)
    ratio = full["flops"] / fast["flops"]
    assert 1.8 < ratio < 1.9
    assert full["compiled_flops"] / fast["compiled_flops"] == pytest.approx(ratio, rel=0.02)


def test_operations_are_those_of_the_shapes():
    found = compiled("v5e-8", "fastkv", "--tokens", "32768", effort=QUICKLY)
    full, fast = (tokens_flops(n) for n in (32_768, int(32_768 * 0.2)))
    assert found["flops"] == pytest.approx(16 * full + 16 * fast + 2 * 4096 * 128_256, rel=1e-12)


def tokens_flops(n: int) -> int:
    """One layer of Llama-3.1-8B: q and o, k and v, three of the MLP; attention's two products over half the square."""
    products = 2 * n * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    return products + 2 * 2 * 4096 * n * (n + 1) // 2


@pytest.mark.parametrize("target", list(aot_compile.GPU_TARGETS))
def test_programs_for_a_gpu_are_lowered_where_there_is_none(target: str):
    run = jax.jit(functools.partial(linear, implementation="gpu"))
    shapes = ((1, 256), jnp.bfloat16), ((2, 128, 256), jnp.bfloat16), ((), jnp.int32)
    with aot_compile.described(target):
        traced = run.trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "5"], "tokens must be >= 128, got 5"),
        (["--method", "none"], "unknown method 'none'; there are: full, fastkv"),
        (["--method", "asl"], "decides on the host"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(words, message, capsys):
    assert aot_compile.main(["--target", "v5e-8", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
