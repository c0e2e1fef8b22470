"""benchmark.py: what it prints, and what it refuses."""

import json

import pytest

from fastkv_jax.benchmarks import device_rates, kernel_cases, processes
from fastkv_jax.cli import benchmark
from fastkv_jax.errors import BackendError

KERNELS = ["kernels", "--platform", "cpu", "--quiet", "--no-compile-cache", "--repeats", "1", "--rows", "1"]


@pytest.fixture(autouse=True)
def small_yardsticks(monkeypatch):
    monkeypatch.setattr(device_rates, "LEAST_S", 1e-3)
    monkeypatch.setitem(device_rates.SIZES, "cpu", (1 << 20, 256))
    monkeypatch.setitem(kernel_cases.STACK, "cpu", 1)
    monkeypatch.setattr(kernel_cases, "MATRICES", ((48, 64),))
    monkeypatch.setattr(kernel_cases, "NORMED", {"projections": ((48, 16), 64), "gated": ((32, 32), 64)})


def test_every_kernel_is_set_against_the_copy_and_the_product(capsys):
    assert benchmark.main([*KERNELS, "--tokens", "256", "--slots", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["copy_bytes_per_s"] != 0 and found["product_flops_per_s"] != 0 and found["kernels"] == "reference"
    assert [row["op"] for row in found["rows"]] == ["window_scores", "select", *["decode_attention"] * 3,
                                                    "linear", "projections", "gated", "prefill attention"]  # fmt: skip
    scores, select, decode, small, _, linear, projections, gated, _ = found["rows"]
    assert scores["bytes"] == 4 * (8 * 256 * 128 + 32 * 8 * 128 + 8 * 256) and scores["target"] == 0.85
    assert scores["flops"] == 2 * 32 * 8 * 128 * 256 and select["target"] is None
    assert decode["target"] == 0.75 and small["bytes"] < 0.6 * decode["bytes"]
    assert linear["bytes"] == 4 * 48 * 64 and linear["flops"] == 2 * 48 * 64 and linear["target"] == 0.75
    assert projections["bytes"] == gated["bytes"] == 4 * 64 * 64 and gated["flops"] == 2 * 64 * 64


def test_a_table_without_json(capsys):
    assert benchmark.main([*KERNELS, "--tokens", "128", "--slots", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cpu, jax") and "| decode_attention | B·K 8, C 1, int8 |" in out


def test_methods_race_against_full_context_and_the_arithmetic(capsys, tmp_path, tiny_model):
    words = ["--model", str(tiny_model), "--platform", "cpu", "--quiet", "--no-compile-cache", "--repeats", "2"]
    settings = ["--retention-rate", "0.1", "--min-prompt-to-compress", "0"]
    more = ["--tokens", "300", "380", "--batch", "2", "--new-tokens", "16", "--methods", "fastkv", "snapkv"]
    out = ["--json", "--output", str(tmp_path / "speed"), "--profile", str(tmp_path / "trace")]
    assert benchmark.main([*words, *more, *settings, *out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["tokens"], row["name"]) for row in found["rows"]] == [
        (n, name) for n in (300, 380) for name in ("full", "fastkv", "snapkv")
    ]
    for row in found["rows"]:
        full = next(other for other in found["rows"] if (other["tokens"], other["name"]) == (row["tokens"], "full"))
        for part in ("prefill", "decode", "whole"):
            low, high = row[f"{part}_range_s"]
            assert 0 < low <= row[f"{part}_s"] <= high
            assert row[f"{part}_speedup"] == pytest.approx(full[f"{part}_s"] / row[f"{part}_s"])
        assert row["whole_s"] > row["prefill_s"] and ("scoring_share" in row) == (row["name"] != "full")
        assert row["prefill_limit"] > 1.5 if row["name"] == "fastkv" else row["prefill_limit"] == 1
        assert row["decode_limit"] > 1 or row["name"] == "full"
    assert json.loads((tmp_path / "speed" / "speed.json").read_text()) == found
    assert "| 380 | snapkv |" in (tmp_path / "speed" / "speed.md").read_text()
    assert (tmp_path / "speed" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "trace").rglob("perfetto_trace.json.gz"))


def test_without_the_device_s_rates_there_are_no_shares(capsys, tiny_model):
    words = ["--model", str(tiny_model), "--platform", "cpu", "--quiet", "--no-compile-cache", "--repeats", "1"]
    assert benchmark.main([*words, "--tokens", "300", "--new-tokens", "16", "--method", "full", "--no-rates"]) == 0
    head, *_, row = capsys.readouterr().out.splitlines()
    assert "TFLOP/s" not in head
    assert [len(cell.strip()) > 0 for cell in row.split("|")[3:8]] == [True, True, False, False, True]


def test_what_a_user_waits_for_is_measured_from_the_outside(capsys, tiny_model):
    words = ["command", "--model", str(tiny_model), "--platform", "cpu", "--quiet", "--repeats", "1"]
    assert benchmark.main([*words, "--tokens", "100", "--chunk", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == [
        "full", "preset", "preset, nothing compiled before", "preset, --prefill-chunk 64",
    ]  # fmt: skip
    for row in found["rows"]:
        assert 0 < row["first_s"] <= row["whole_s"] and row["tokens"] > 100
        assert row["peak_bytes"] > 1e8 and 0 < row["bare_prefill_s"] < row["first_s"]
    assert found["help_s"] < min(row["first_s"] for row in found["rows"])


def test_a_command_that_fails_says_why():
    with pytest.raises(BackendError, match="^generate: max_new_tokens must be >= 1, got 0$"):
        processes.wait_for(["generate", "--prompt", "x", "-n", "0"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--tokens", "64"], "tokens must be >= 128, got 64"),
        (["kernels", "--slots", "5", "0"], "slots must be >= 1, got 0"),
        (["command", "--tokens", "9"], "tokens must be >= 64, got 9"),
        (["--tokens", "0"], "tokens must be >= 1, got 0"),
        (["--new-tokens", "3"], "new_tokens must be >= 16, got 3"),
        (["--batch", "0"], "batch must be >= 1, got 0"),
        (["--methods", "fast"], "unknown method 'fast'; there are: full, fastkv"),
    ],
)
def test_what_cannot_be_timed_is_one_line(words, message, capsys):
    assert benchmark.main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
