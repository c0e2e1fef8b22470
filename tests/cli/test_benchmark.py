"""benchmark.py: what it prints, and what it refuses."""

import json

import pytest

from fastkv_jax.cli import benchmark, device_rates

KERNELS = ["kernels", "--platform", "cpu", "--quiet", "--no-compile-cache", "--repeats", "1", "--rows", "1"]


def test_every_kernel_is_set_against_the_copy_and_the_product(monkeypatch, capsys):
    monkeypatch.setattr(device_rates, "LEAST_S", 1e-3)
    assert benchmark.main([*KERNELS, "--tokens", "256", "--slots", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["copy_bytes_per_s"] != 0 and found["product_flops_per_s"] != 0 and found["kernels"] == "reference"
    assert [row["op"] for row in found["rows"]] == ["window_scores", "select", *["decode_attention"] * 3,
                                                    "prefill attention"]  # fmt: skip
    scores, select, decode, small, *_ = found["rows"]
    assert scores["bytes"] == 4 * (8 * 256 * 128 + 32 * 8 * 128 + 8 * 256) and scores["target"] == 0.85
    assert scores["flops"] == 2 * 2 * 32 * 8 * 128 * 256 and select["target"] is None
    assert decode["target"] == 0.75 and small["bytes"] < 0.6 * decode["bytes"]


def test_a_table_without_json(monkeypatch, capsys):
    monkeypatch.setattr(device_rates, "LEAST_S", 1e-3)
    assert benchmark.main([*KERNELS, "--tokens", "128", "--slots", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cpu, jax") and "| decode_attention | B·K 8, C 1, int8 |" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--tokens", "64"], "tokens must be >= 128, got 64"),
        (["kernels", "--slots", "5", "0"], "slots must be >= 1, got 0"),
        (["--tokens", "0"], "tokens must be >= 1, got 0"),
        (["--new-tokens", "3"], "new_tokens must be >= 16, got 3"),
    ],
)
def test_what_cannot_be_timed_is_one_line(words, message, capsys):
    assert benchmark.main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
