"""check_device.py: a table of what is right on a device, whatever happens to its steps."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastkv_jax.cli import check_device, commands
from fastkv_jax.cli.check_device import report, supervising
from fastkv_jax.device_checks.results import DIED, MISSING, RIGHT, WRONG, Row
from fastkv_jax.device_checks.steps import STEPS

USAGE, DEVICE, INTERRUPTED, TERMINATED = 2, 4, 130, 143
CPU = ["--platform", "cpu", "--no-compile-cache", "--quick"]
QUIET = [*CPU, "--quiet"]


@pytest.fixture
def in_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Have the processes of a step run some lines before anything else."""

    def write(step: str, lines: str) -> None:
        body = "\n".join(f"    {line}" for line in lines.splitlines())
        head = f"import os, sys, time\nif '--inside' in sys.orig_argv and {step!r} in sys.orig_argv:\n"
        (tmp_path / "sitecustomize.py").write_text(head + body)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    return write


def cells(out: str) -> list[list[str]]:
    """Step, check, result, found and seconds of each row of a table."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert lines[0] == "| step | check | result | found | s |"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


@pytest.mark.usefixtures("smollm2_path")
def test_every_step_is_right_on_a_cpu(capfd, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)  # the trained model is worth them
    file = tmp_path / "report.json"
    assert check_device.main([*QUIET, "--json", "--output", str(file)]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert err == "" and found | {"seconds": 0} == json.loads(file.read_text()) | {"seconds": 0}
    assert found["complete"] and found["right"] and found["quick"] and set(found["counts"]) == {"right", "measured"}
    assert list(dict.fromkeys(row["step"] for row in found["rows"])) == [step.name for step in STEPS]
    names = {row["check"]: row for row in found["rows"]}
    for kernel in (
        "window_scores", "append", "decode_attention", "linear", "projections", "gated", "prefill attention", "select",
        "among_best",
    ):  # fmt: skip
        assert any(name.startswith(kernel) and row["status"] == "right" for name, row in names.items())
    assert names["versions"]["numbers"]["jax"] and names["memory"]["numbers"]["platform"] == "cpu"
    assert names["smollm2-135m, fastkv, float32"]["numbers"]["answer"].count("4072915") == 1
    assert names["copy and product"]["numbers"]["copy_bytes_per_s"] > 0
    fast = names["tiny, 256 tokens, fastkv"]["numbers"]
    assert fast["prefill_s"] > 0 and fast["prefill_limit"] > 1.5 and fast["share_of_product"] > 0


def test_a_broken_kernel_is_named_and_fails_the_command(capfd, in_the_steps):
    in_the_steps("kernels", """import importlib
kernels = importlib.import_module('fastkv_jax.device_checks.kernels')
kernels.scores.checks = kernels.decode.checks = lambda *_: ()  # less to wait for
gpu = importlib.import_module('kernels_pallas.linear.gpu')
real = gpu.gated
gpu.gated = lambda *a, **k: real(*a, **k) * 1.1""")  # fmt: skip
    assert check_device.main([*QUIET, "--steps", "kernels"]) == 1
    out = capfd.readouterr().out
    results = {(check.split()[0], result) for _, check, result, _, _ in cells(out)}
    assert results == {
        ("gated", "**wrong**"),
        *((name, "right") for name in ("linear", "projections", "append", "prefill")),
    }
    assert "3 wrong, 0 died" in out and "\nwrong: kernels: gated B 1, O 512, I 512, bfloat16" in out


def test_a_check_that_kills_its_process_is_a_row_and_the_next_ones_run(capfd, in_the_steps):
    in_the_steps("device", "import fastkv_jax.device_checks.device as device\n"
                 "def die():\n    print('E0 the driver said no', file=sys.stderr, flush=True)\n"
                 "    os.kill(os.getpid(), 11)\ndevice._driver = die")  # fmt: skip
    assert check_device.main([*QUIET, "--steps", "device", "selection"]) == 1
    out = capfd.readouterr().out
    (step, check, result, found, _), *others = cells(out)
    assert (step, check, result) == ("device", "versions", "**died**")
    assert found == "killed by SIGSEGV; E0 the driver said no"
    assert [row[1] for row in others[:2]] == ["memory", "first product"] and others[-1][0] == "selection"
    assert {row[2] for row in others} == {"right", "measured"} and "1 died" in out


def test_a_step_that_takes_too_long_is_a_row_and_the_next_one_runs(capfd, in_the_steps, monkeypatch):
    in_the_steps("device", "time.sleep(1000)")
    monkeypatch.setattr(check_device, "allowances", lambda steps, quick: [0.02, 1.0])
    assert check_device.main([*QUIET, "--steps", "device", "selection", "--limit", "200"]) == 1
    first, *others = cells(capfd.readouterr().out)
    assert first[:4] == ["device", "(the step)", "**died**", "not done within 4 s"]
    assert {(row[0], row[2]) for row in others} == {("selection", "right")}


def test_a_step_that_dies_before_its_first_check_is_not_begun_again(capfd, in_the_steps):
    in_the_steps("selection", "print('error: no', file=sys.stderr)\nos._exit(7)")
    assert check_device.main([*QUIET, "--steps", "selection"]) == 1
    assert [row[:4] for row in cells(capfd.readouterr().out)] == [["selection", "(the step)", "**died**", "no"]]


def test_steps_without_time_are_rows(capfd, monkeypatch):
    monkeypatch.setattr(supervising, "rows", lambda *_, **__: pytest.fail("a step ran"))
    assert check_device.main([*QUIET, "--limit", "2"]) == 0
    out = capfd.readouterr().out
    assert [row[::2] for row in cells(out)][:1] == [["device", "no time left", "0.0"]]
    assert len(cells(out)) == 9 and "\n9 no time left (device; kernels; offsets;" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_whoever_ends_it_gets_what_there_is(number, code, tmp_path):
    file = tmp_path / "report.json"
    listens = ["env", "--default-signal=INT"]  # a shell's background jobs ignore Ctrl-C, and so would their children
    command = [*listens, sys.executable, "scripts/check_device.py", *QUIET, "--output", str(file)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        begun = [process.stdout.readline() for _ in range(3)]  # two lines of head, and a row
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (
        process.returncode == code and err == f"error: {'interrupted' if number == signal.SIGINT else 'terminated'}\n"
    )
    assert begun[2].startswith("| device | versions | measured |") and out.rstrip().endswith("; not complete")
    found = json.loads(file.read_text())
    assert not found["complete"] and found["rows"][0]["check"] == "versions"


def test_without_the_device_it_says_so_once(capfd, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    file = tmp_path / "report.json"
    assert check_device.main(["--platform", "gpu", "--quiet", "--output", str(file)]) == DEVICE
    assert capfd.readouterr().err.startswith("error: no CUDA device visible to JAX")
    assert [row["step"] for row in json.loads(file.read_text())["rows"]] == ["device"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "limit must be finite and > 0, got 0.0"),
        (["--limit", "nan"], "limit must be finite and > 0, got nan"),
        (["--steps", "kernel"], "argument --steps: invalid choice: 'kernel'"),
        (["--platform", "xpu"], "argument --platform: invalid choice: 'xpu'"),
        (["--quik"], "unknown argument '--quik'; did you mean --quick?"),
        (["--output", "."], "cannot write .: it is a folder"),
        (["--output", "nowhere/report.json"], "cannot write nowhere/report.json: there is no folder"),
        (["--output", "/proc/report.json"], "cannot write /proc/report.json: No such file or directory"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_runs(words, message, capfd, monkeypatch):
    monkeypatch.setattr(supervising, "rows", lambda *_, **__: pytest.fail("a step ran"))
    try:
        code = check_device.main(words)
    except SystemExit as left:
        code = left.code
    out, err = capfd.readouterr()
    assert code == USAGE and out == "" and message in err and err.count("\n") == 1


def test_the_process_that_waits_imports_no_jax():
    code = "import sys, fastkv_jax.cli.check_device; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_is_one_of_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        commands.main(["check_device", "--help"])
    assert "--inside" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("", ""),
        ("error: no TPU visible to JAX\n", "no TPU visible to JAX"),
        ("F0 a.cc:7] Check failed\n*** Check failure stack trace: ***\n    @ 0x7f main\n", "F0 a.cc:7] Check failed"),
        ("CUDA_ERROR: bad\nFatal Python error: Aborted\n\n  File \"a.py\", line 1 in f\n", "CUDA_ERROR: bad"),
    ],
)  # fmt: skip
def test_the_last_words_of_a_process_are_those_that_say_something(said: str, line: str):
    assert supervising.last_words(said) == line


def test_rows_stand_in_a_table_of_markdown_and_the_rest_in_a_line():
    rows = [Row("kernels", "a | b", RIGHT, "1e-3 of 1e-2", seconds=1.25), Row("kernels", "c", WRONG, "2e-2 of 1e-2"),
            Row("answer", "", MISSING, "no network"), Row("recorded", "x", DIED, "killed")]  # fmt: skip
    assert report.line(rows[0]) == "| kernels | a \\| b | right | 1e-3 of 1e-2 | 1.2 |"
    assert report.line(rows[1]) == "| kernels | c | **wrong** | 2e-2 of 1e-2 | 0.0 |"
    assert report.summary(rows) == (
        "1 right, 0 measured, 1 wrong, 1 died\nwrong: kernels: c\ndied: recorded: x\n1 missing (answer)"
    )


def test_each_step_may_take_its_share_of_the_time_that_is_left(capfd, monkeypatch):
    given = []
    monkeypatch.setattr(
        supervising, "rows", lambda step, words, seconds, **_: given.append((step, seconds)) or iter(())
    )
    monkeypatch.setattr(supervising, "Clock", lambda seconds: SimpleNamespace(left=lambda: seconds))  # none is used
    assert check_device.main([*QUIET, "--limit", "240"]) == 0
    assert given[0] == ("device", 35) and given[1] == ("kernels", pytest.approx(240 * 70 / 205))
    assert given[-1] == ("model-speed", 240)
