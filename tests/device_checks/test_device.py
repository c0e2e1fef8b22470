"""What a device is said to be and to have."""

import subprocess

import pytest

from fastkv_jax.device_checks import device
from fastkv_jax.device_checks.results import DoesNotFit


def test_what_does_not_fit_is_said_with_both_numbers(monkeypatch):
    monkeypatch.setattr(device, "memory", lambda: 8e9)
    device.need(7.9e9)
    with pytest.raises(DoesNotFit, match=r"needs 8\.1 GB of 8\.0"):
        device.need(8.1e9)


def test_where_memory_is_unknown_everything_fits(monkeypatch):
    monkeypatch.setattr(device, "memory", lambda: None)
    device.need(1e15)


def test_a_driver_is_named_where_there_is_one(monkeypatch):
    done = subprocess.CompletedProcess([], 0, "580.1\n580.1\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert device._driver() == "580.1"

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    assert device._driver() == ""


def test_a_device_that_multiplies_wrongly_is_found_out(monkeypatch):
    assert device._product(64, "float32").status == "right"
    monkeypatch.setattr(device.jax, "block_until_ready", lambda x: x.at[3, 5].add(1.0))
    assert device._product(64, "float32").status == "wrong"
