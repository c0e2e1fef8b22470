"""A layer read in place: wrong offsets are found, and memory is asked for first."""

import jax.numpy as jnp
import pytest

import kernels_pallas
from fastkv_jax.device_checks import device, offsets
from fastkv_jax.device_checks.results import DoesNotFit


def test_a_kernel_that_reads_another_layer_is_found_out(monkeypatch):
    real = kernels_pallas.linear
    monkeypatch.setattr(kernels_pallas, "linear", lambda x, w, i, **_: real(x, w, jnp.minimum(i, 2)))
    (check,) = (check for check in offsets.checks("cpu", True) if check.name.startswith("linear"))
    outcome = check.run()
    assert outcome.status == "wrong" and outcome.numbers["wrong_layers"] == [3, 4, 7]


def test_nothing_is_made_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(device, "memory", lambda: int(1e9))
    monkeypatch.setattr(offsets, "_stack", lambda *_: pytest.fail("a stack was made"))
    checks = list(offsets.checks("gpu", False))
    assert [check.name for check in checks] == [
        "decode_attention bfloat16, 2^32 elements", "linear bfloat16, 2^32 elements",
        "decode_attention int8, 2^31 elements", "decode_attention int8, 2^32 elements",
    ]  # fmt: skip
    for check in checks:
        with pytest.raises(DoesNotFit, match=r"needs \d\.\d GB of 1\.0"):
            check.run()
