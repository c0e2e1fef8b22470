"""evaluate.py: a suite or a grid from a command to a table, resumed, shared by processes, refused in one line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastkv_jax.cli import evaluate

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
NEEDLES = ["--suite", "needle", "--lengths", "900", "--depths", "3", "--platform", "cpu", "--no-compile-cache"]
TIMES = ("ttft_s", "token_s", "compiled", "rows")


def records(folder: Path) -> list[dict]:
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def needles(tiny_model):
    return [*NEEDLES, "--model", str(tiny_model)]


@pytest.fixture(scope="module")
def done(tmp_path_factory, needles):
    out = tmp_path_factory.mktemp("evaluate") / "out"
    assert evaluate.main([*needles, "--quiet", "--output", str(out)]) == 0
    return out


def test_every_needle_has_a_record_a_table_and_a_picture(done):
    found = records(done / "fastkv")
    assert [(record["task"], record["id"]) for record in found] == [("needle", f"900/{d}") for d in (0, 50, 100)]
    assert all(record["score"] in (0.0, 1.0) and record["prediction"] for record in found)
    assert "needle" in (done / "table.md").read_text() and "needle" in (done / "table.csv").read_text()
    assert json.loads((done / "table.json").read_text())[0]["name"] == "fastkv"
    assert (done / "needle-fastkv.png").read_bytes().startswith(b"\x89PNG")


def test_given_again_the_command_answers_nothing_anew(done, needles, capsys):
    before = sorted((done / "fastkv").iterdir())
    assert evaluate.main([*needles, "--output", str(done)]) == 0
    printed = capsys.readouterr()
    assert "3 of 3 samples were answered before" in printed.err and "needle" in printed.out
    assert sorted((done / "fastkv").iterdir()) == before


def test_another_configuration_is_refused(done, needles, capsys):
    assert evaluate.main([*needles, "--quiet", "--retention-rate", "0.15", "--output", str(done)]) == 2
    err = capsys.readouterr().err
    assert "is of another configuration (settings" in err and err.count("\n") == 1


def test_a_grid_runs_every_method(tmp_path, tiny_model, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("""
        suites:
          - {suite: perplexity, lengths: [800], samples: 1}
        runs:
          - {name: "Full, all", method: full}
          - {name: SnapKV 30 %, method: snapkv, settings: {retention_rate: 0.3, min_prompt_to_compress: 0}}
    """)
    flags = ["--suite", str(grid), "--model", str(tiny_model), "--platform", "cpu", "--quiet", "--no-compile-cache"]
    assert evaluate.main([*flags, "--output", str(tmp_path / "out")]) == 0
    full, snap = (records(tmp_path / "out" / name)[0] for name in ("full-all", "snapkv-30"))
    assert 0 < full["nll"] != snap["nll"] and full["kv_bytes"] == 1.0 and 0.25 < snap["kv_bytes"] < 0.35
    out = capsys.readouterr().out
    assert "nats/token" in out and f"{full['nll']:.3f}" in out and "SnapKV 30 %" in out


def test_two_processes_share_the_samples(tmp_path, done, needles):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *needles, "--output", tmp_path / "out", "--distributed", f"{address},2,{i}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert records(tmp_path / "out" / "fastkv") == records(done / "fastkv")
    assert {path.name for path in (tmp_path / "out" / "fastkv").glob("part-*")} == {"part-0-1.jsonl", "part-1-1.jsonl"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "needles"], "unknown suite 'needles'; there are: ruler, longbench, needle, perplexity, evidence"),
        (["--suite", "ruler"], "suite ruler needs lengths"),
        (["--suite", "needle", "--lengths", "300", "--batch-tokens", "0"], "batch_tokens must be >= 1, got 0"),
        (["--suite", "needle", "--lengths", "300", "--mesh", "rows=2"], "--mesh takes data=N,tensor=N,sequence=N"),
        (["--suite", "needle", "--lengths", "300", "--mesh", "data=2,data=2"], "--mesh names data twice"),
        (["--suite", "needle", "--lengths", "300", "--mesh", "data=99"], "--mesh wants 99 devices, this process has 8"),
        (["--suite", "needle", "--lengths", "300", "--distributed", "here"], "--distributed takes HOST:PORT,N,I"),
        (["--suite", "needle", "--lengths", "300", "--max-tokens", "99999"], "max_tokens must be in 1 ... 4,096"),
        (["--suite", "evidence", "--lengths", "300"], "--lengths belongs to one suite and method; evidence has its"),
        (["--suite", "evidence", "--tsp-rate", "0.3"], "--tsp-rate belongs to one suite and method; evidence has"),
        (["--suite", "longbench", "--data", "/nowhere"], "/nowhere/narrativeqa.jsonl"),
        (["--suite", "needle", "--lengths", "20"], "does not fit into length 20"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(words, message, tmp_path, capsys, tiny_model):
    out = tmp_path / "out"
    assert (
        evaluate.main([*words, "--model", str(tiny_model), "--platform", "cpu", "--quiet", "--output", str(out)]) == 2
    )
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not out.exists()


def test_an_output_that_is_a_file_or_somebody_elses_folder_is_refused(tmp_path, needles, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        assert evaluate.main([*needles, "--quiet", "--output", str(tmp_path / name)]) == 2
        assert "mine" == next(iter(tmp_path.glob(f"{name}/thesis.tex")), tmp_path / "file").read_text()
    assert capsys.readouterr().err.count("\n") == 2
