"""What is timed is the operation: nothing large is copied around it, and the compiler knows the number of turns."""

import re

import jax
import jax.numpy as jnp
import pytest

from fastkv_jax.benchmarks import device_rates, kernel_cases
from fastkv_jax.benchmarks.compiled.flops import flops
from fastkv_jax.benchmarks.compiled.program import parse
from fastkv_jax.benchmarks.device_rates import Case, program

TURNS = 7


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel_cases.STACK, "cpu", 1)
        patch.setattr(kernel_cases, "MATRICES", ((192, 256), (256, 256)))
        patch.setattr(kernel_cases, "NORMED", {"projections": ((128, 64, 64), 256), "gated": ((192, 192), 256)})
        patch.setitem(device_rates.SIZES, "cpu", (1 << 16, 128))
        return kernel_cases.cases("cpu", "reference", [640], [256], 2)


@pytest.mark.parametrize("place", range(12))
def test_turns_are_known_and_nothing_large_is_written_around_them(cases: list[Case], place: int):
    case = cases[place]
    text = program(case, TURNS).lower(*case.args).compile().as_text()
    computations, entry = parse(text)
    inside = [i for computation in computations.values() for i in computation.values()]
    (loop,) = [i for i in computations[entry].values() if i.kind == "while"]
    assert f'"known_trip_count":{{"n":"{TURNS}"}}' in loop.rest
    large = {a.shape for a in case.args if a.size >= 5000}
    again = [i for i in inside if i.kind in ("copy", "dynamic-update-slice") and i.shape in large]
    assert large and not again
    whole = jax.eval_shape(case.run, jnp.int32(0), *case.args).shape
    made = computations[re.findall(r"body=%?([\w.\-]+)", loop.rest)[0]].values()
    assert any(i.shape == whole and i.kind not in ("parameter", "get-tuple-element", "tuple", "copy") for i in made)


def test_every_turn_waits_for_the_one_before(cases: list[Case]):
    """No turn can leave the loop: one more of them is so many operations more."""
    for case in cases:
        if case.flops and case.name != "prefill attention":  # whose blocks are loops of their own
            some = flops(program(case, TURNS).lower(*case.args).compile().as_text())
            assert some >= TURNS * case.flops, case.shape


def test_layers_take_turns_beyond_any_cache(monkeypatch):
    monkeypatch.setitem(kernel_cases.STACK, "cpu", 100_000)
    monkeypatch.setattr(kernel_cases, "MATRICES", ((48, 64),))
    monkeypatch.setattr(kernel_cases, "NORMED", {})
    case = next(case for case in kernel_cases.cases("cpu", "reference", [128], [128], 1) if case.name == "linear")
    assert case.args[1].shape == (9, 48, 64) and case.bytes == 4 * 48 * 64
