"""Each check of a kernel finds the fault that it is there for."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax.device_checks.kernels import append, decode, linear, prefill, scores, selection
from fastkv_jax.device_checks.kernels.inputs import check_float8
from fastkv_jax.device_checks.results import Check, Missing
from fastkv_jax.model import attention

FAULTS: dict[str, tuple[Any, str, str, Callable[..., Any]]] = {
    "a key of the padding is seen": (
        scores, "window_scores", "window_scores.gpu",
        lambda run: lambda q, k, start, stop, **o: run(q, jnp.nan_to_num(k), start.at[-1].add(-1), stop, **o),
    ),
    "the last slot is not seen": (
        decode, "decode_attention", "decode_attention.gpu",
        lambda run: lambda q, prompt, *rest, **o: run(
            q, prompt._replace(positions=prompt.positions.at[..., -1].set(-1)), *rest, **o),
    ),
    "an empty slot is seen": (
        decode, "decode_attention", "decode_attention.gpu",
        lambda run: lambda q, prompt, *rest, **o: run(
            q, prompt._replace(positions=jnp.maximum(prompt.positions, 0)), *rest, **o),
    ),
    "one output is a little off": (
        linear, "products", "linear.gpu",
        lambda run: lambda *given, **o: tuple(y.at[-1, -1].multiply(1.2) for y in run(*given, **o)),
    ),
    "another layer is read": (
        linear, "products", "linear.gpu",
        lambda run: lambda *given, **o: run(*given[:-1], given[-1] - 1, **o),
    ),
    "another slot is written": (
        append, "append", "append.gpu",
        lambda run: lambda *given, **o: run(*given[:-2], given[-2] - 1, given[-1], **o),
    ),
    "ties go to the highest index": (
        selection, "select", "select.gpu",
        lambda run: lambda scores, count, capacity, **o: scores.shape[1] - 1 - run(
            scores[:, ::-1], count, capacity, **o)[:, ::-1],
    ),
}  # fmt: skip


def first(module: Any, platform: str = "cpu") -> Check:
    return next(iter(module.checks(platform, True)))


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_of_a_kernel_is_found_out(fault: str, monkeypatch):
    module, name, where, broken = FAULTS[fault]
    kernels = importlib.import_module(f"kernels_pallas.{where}")
    monkeypatch.setattr(kernels, name, broken(getattr(kernels, name)))
    assert first(module).run().status == "wrong"


@pytest.mark.parametrize("module", [scores, decode, linear, append, prefill, selection])
def test_without_a_fault_it_is_right(module):
    assert first(module).run().status == "right"


def test_padding_that_a_prompt_sees_is_found_out(monkeypatch):
    real = attention._blocked
    monkeypatch.setattr(attention, "_blocked", lambda q, k, v, start: real(q, k, v, jnp.maximum(start - 1, 0)))
    assert first(prefill).run().status == "wrong"


def test_padding_that_becomes_nan_is_found_out(monkeypatch):
    real = attention._blocked

    def leaves_holes(q, k, v, start):
        padding = jnp.arange(q.shape[2])[None] < start[:, None]
        return jnp.where(padding[:, None, :, None], jnp.asarray(np.nan, q.dtype), real(q, k, v, start))

    monkeypatch.setattr(attention, "_blocked", leaves_holes)
    outcome = first(prefill).run()
    assert outcome.status == "wrong" and outcome.found.endswith("rows that are not finite")


def test_what_a_device_has_no_numbers_for_is_missing(monkeypatch):
    class Old:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "local_devices", lambda: [Old()])
    check_float8("tpu")
    with pytest.raises(Missing, match=r"float8_e4m3fn needs compute capability 8\.9, this device has 8\.0"):
        check_float8("gpu")
