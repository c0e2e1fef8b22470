"""evaluate.py: a suite or a grid from a command to a table, resumed, shared by processes, refused in one line."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from etils.epath import backend

import moments
from fastkv_jax.cli import convert, evaluate
from fastkv_jax.evals.records import locks
from fastkv_jax.files import scratch_in

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
QUICK = ["--platform", "cpu", "--no-compile-cache"]
NEEDLES = ["--suite", "needle", "--lengths", "900", "--depths", "3", *QUICK]
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
    assert (done / "needles.png").read_bytes().startswith(b"\x89PNG")


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


def test_a_run_keeps_the_date_that_it_began_on(tmp_path, tiny_model, capsys):
    """The template writes the date: a run that goes on after midnight asks what it asked before."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("Today is {{ strftime_now('%d %B %Y') }}.\n" + template)
    needle = ["--suite", "needle", "--lengths", "900", "--depths", "2"]
    words = [*needle, *QUICK, "--model", str(model), "--output", str(out)]
    assert evaluate.main([*words, "--quiet", "--date", "2024-02-29"]) == 0
    before = records(out / "fastkv")
    (out / "fastkv" / "results.jsonl").unlink()
    assert evaluate.main(words) == 0  # on another day
    err = capsys.readouterr().err
    assert "2024-02-29T00:00:00, on which this run began" in err and "2 of 2 samples were answered before" in err
    assert records(out / "fastkv") == before
    assert json.loads((out / "fastkv" / "run.json").read_text())["config"]["date"].startswith("2024-02-29")
    assert evaluate.main([*words, "--quiet", "--date", "2024-03-01"]) == 2
    assert 'date "2024-02-29T00:00:00" there, "2024-03-01T00:00:00" here' in capsys.readouterr().err


def test_arguments_of_the_template_are_part_of_a_run(tmp_path, tiny_model, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(
        template + "{% if enable_thinking is defined and not enable_thinking %}Say it at once.{% endif %}"
    )
    row = {"input": "Who?", "context": "It was the baker.", "answers": ["the baker"], "length": 9,
           "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "0"}  # fmt: skip
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--suite", "longbench", "--tasks", "hotpotqa", "--data", str(tmp_path), *QUICK, "--model", str(model)]
    at_once = ["--chat-template-args", '{"enable_thinking": false}']
    assert evaluate.main([*words, "--quiet", *at_once, "--output", str(out)]) == 0
    assert evaluate.main([*words, "--quiet", "--output", str(tmp_path / "thinks")]) == 0
    (told,), (thinks,) = (records(folder / "fastkv") for folder in (out, tmp_path / "thinks"))
    assert told["prompt_tokens"] == thinks["prompt_tokens"] + len("Say it at once.")
    run = json.loads((out / "fastkv" / "run.json").read_text())
    assert run["config"]["chat_template_args"] == {"enable_thinking": False}
    capsys.readouterr()
    assert evaluate.main([*words, "--quiet", "--output", str(out)]) == 2
    assert "is of another configuration (chat_template_args" in capsys.readouterr().err


def test_a_grid_runs_every_method(tmp_path, tiny_model, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("""
        suites:
          - {suite: perplexity, lengths: [800], samples: 1}
        runs:
          - {name: "Full, all", method: full}
          - {name: SnapKV 30 %, method: snapkv, settings: {retention_rate: 0.3, min_prompt_to_compress: 0}}
    """)
    flags = [*QUICK, "--suite", str(grid), "--model", str(tiny_model), "--quiet"]
    assert evaluate.main([*flags, "--output", str(tmp_path / "out")]) == 0
    full, snap = (records(tmp_path / "out" / name)[0] for name in ("full-all", "snapkv-30"))
    assert 0 < full["nll"] != snap["nll"] and full["kv_bytes"] == 1.0 and 0.25 < snap["kv_bytes"] < 0.35
    out = capsys.readouterr().out
    assert "nats/token" in out and f"{full['nll']:.3f}" in out and "SnapKV 30 %" in out


def test_a_grid_may_share_its_prefills_and_the_answers_are_the_same(tmp_path, tiny_model, capsys):
    grid = """
        suites:
          - {suite: needle, lengths: [600], depths: 2}
          - {suite: perplexity, lengths: [500], samples: 1}
        runs:
          - {name: full, method: full}
          - {name: fastkv, method: fastkv, settings: {min_prompt_to_compress: 0}}
          - {name: snapkv, method: snapkv, settings: {retention_rate: 0.3, min_prompt_to_compress: 0}}
    """
    for name, more in (("alone", ""), ("shared", "\n        share_prefill: true")):
        (tmp_path / f"{name}.yaml").write_text(grid + more)
        flags = [*QUICK, "--suite", str(tmp_path / f"{name}.yaml"), "--model", str(tiny_model), "--max-rows", "1"]
        assert evaluate.main([*flags, "--quiet", "--output", str(tmp_path / name)]) == 0
    for method in ("full", "fastkv", "snapkv"):
        alone, shared = (records(tmp_path / name / method) for name in ("alone", "shared"))
        for one, other in zip(alone, shared, strict=True):
            assert (one.pop("config_hash") == other.pop("config_hash")) == (method == "fastkv")
            assert one.pop("nll", 0) == pytest.approx(other.pop("nll", 0), rel=1e-4) and one == other
        timed = [json.loads(line) for line in (tmp_path / "shared" / method / "results.jsonl").read_text().splitlines()]
        assert all(("ttft_s" in record) == (method == "fastkv") for record in timed)
        assert timed[1]["compiled"] == 0  # the second needle is of the first one's shape
    names = [row["name"] for row in json.loads((tmp_path / "shared" / "table.json").read_text())]
    assert names == ["full", "fastkv", "snapkv"]
    capsys.readouterr()
    assert evaluate.main([*flags, "--query-agnostic", "--output", str(tmp_path / "refused")]) == 2
    assert_one_line(capsys, "shared.yaml shares prefills: not with --query-agnostic")


def test_only_the_first_batch_of_a_shape_is_compiled(tmp_path, needles):
    flags = ["--max-rows", "1", "--retention-rate", "0.13", "--quiet"]
    assert evaluate.main([*needles, *flags, "--output", str(tmp_path)]) == 0
    lines = (tmp_path / "fastkv" / "part-0-1.jsonl").read_text().splitlines()
    first, *later = (json.loads(line)["compiled"] for line in lines)
    assert first > 0 and later == [0, 0]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def test_two_processes_share_the_samples(tmp_path, done, needles):
    address = free_address()
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = {**os.environ, "XLA_FLAGS": flags}
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


def test_one_process_is_late_and_killed_and_asked_for_again(tmp_path, done, tiny_model):
    """With our own checkpoint, whose reader knows of processes."""
    assert convert.main([str(tiny_model), str(tmp_path / "model"), "--dtype", "float32", "--quiet"]) == 0
    out, group = tmp_path / "out", f"{free_address()},2,"
    words = [*NEEDLES, "--model", str(tmp_path / "model"), "--output", str(out), "--mesh", "data=1"]

    def begun(process: int) -> subprocess.Popen:
        command = [sys.executable, SCRIPT, *words, "--distributed", f"{group}{process}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    survivor = begun(0)
    assert survivor.stderr is not None
    assert survivor.stderr.readline().startswith("waiting  process 0 of 2 waits at localhost:")
    killed = begun(1)
    while not (out / "fastkv" / ".lock-1-of-2").exists() and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    printed, said = survivor.communicate(timeout=300)
    assert (survivor.returncode, killed.returncode, printed) == (0, -signal.SIGKILL, "")
    assert said.endswith("fastkv: other processes' samples are not all answered yet\n")
    assert {path.name for path in (out / "fastkv").glob("part-*")} == {"part-0-1.jsonl"}
    assert not (out / "table.md").exists()
    assert evaluate.main([*words, "--quiet", "--distributed", f"{group}1"]) == 0  # alone: they have met
    found, expected = records(out / "fastkv"), records(done / "fastkv")
    assert [row | {"config_hash": ""} for row in found] == [row | {"config_hash": ""} for row in expected]
    assert "needle" in (out / "table.md").read_text() and (out / "needles.png").exists()


def test_a_process_alone_says_that_it_waits_and_who_is_missing(tmp_path, needles, capsys):
    command = [*needles, "--output", str(tmp_path / "out"), "--join-timeout", "0.5"]
    for process, missing in ((0, "there is no process 1 of 2"), (1, "there is no process 0 of 2, or others")):
        address = free_address()
        assert evaluate.main([*command, "--distributed", f"{address},2,{process}"]) == 4
        waiting, error = capsys.readouterr().err.splitlines()
        assert waiting == f"waiting  process {process} of 2 waits at {address} for the others, 0.5 s at most"
        assert error.startswith(f"error: after 0.5 s at {address} {missing}")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ disturbed


def cut(folder: Path, line: int) -> None:
    """Half of a line is gone, the last one's end with it, and there are no results yet."""
    lines = (folder / "part-0-1.jsonl").read_bytes().split(b"\n")[:-1]
    lines[line - 1] = lines[line - 1][:40]
    (folder / "part-0-1.jsonl").write_bytes(b"\n".join(lines) + b"\n" * (line < len(lines)))
    (folder / "results.jsonl").unlink()


def table(folder: Path) -> list[dict]:
    rows = json.loads((folder / "table.json").read_text())
    return [{name: value for name, value in row.items() if name not in ("costs", "compiled")} for row in rows]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def assert_one_line(capsys, message: str) -> None:
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""


@pytest.fixture
def again(tmp_path, done, needles):
    """A copy of what was done, and the command for it."""
    shutil.copytree(done, tmp_path / "out")
    return tmp_path / "out" / "fastkv", [*needles, "--quiet", "--output", str(tmp_path / "out")]


def test_killed_at_any_moment_the_same_command_ends_as_if_undisturbed(tmp_path, tiny_model, capsys):
    grid = """
        suites: [{suite: needle, lengths: [300], depths: 1}]
        runs:
          - {name: full, method: full}
          - {name: knorm, method: knorm, settings: {min_prompt_to_compress: 0}}
    """
    (tmp_path / "grid.yaml").write_text(grid)
    flags = [*QUICK, "--suite", str(tmp_path / "grid.yaml"), "--model", str(tiny_model), "--quiet"]
    with moments.copied(tmp_path / "out", tmp_path / "copies"):
        assert evaluate.main([*flags, "--output", str(tmp_path / "out")]) == 0
    states = sorted((tmp_path / "copies").iterdir())
    left = {name for state in states for name in moments.content(state)}
    for name in ("full/.writing", "knorm/.writing", ".writing"):  # the last: tables and pictures
        assert any(path.startswith(name) for path in left)
    assert {".png", ".md", ".csv", ".json"} <= {Path(path).suffix for path in left if path.startswith(".writing")}
    for state in states[:-20:5] + states[-20::2]:  # tables and pictures come last
        assert evaluate.main([*flags, "--output", str(state)]) == 0
        for name in ("full", "knorm"):
            assert records(state / name) == records(tmp_path / "out" / name)
        assert set(os.listdir(state)) == set(os.listdir(tmp_path / "out"))
        assert table(state) == table(tmp_path / "out")
        assert (state / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""


def test_killed_while_the_heat_map_is_drawn(again):
    """And a second process, which shares the folder, leaves a living one's scratch alone."""
    folder, command = again
    process = subprocess.Popen([sys.executable, SCRIPT, *command], stdout=subprocess.DEVNULL)
    while not (drawing := list(folder.parent.glob(".writing*/needles.png"))) and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and drawing[0].exists()
    with scratch_in(folder.parent) as scratch:
        assert evaluate.main(command) == 0
        assert scratch.exists() and not drawing[0].parent.exists()
    assert evaluate.main(command) == 0 and not list(folder.parent.glob(".writing*"))


def test_a_torn_last_line_is_dropped_and_asked_again(again, done, capsys):
    folder, command = again
    cut(folder, 3)
    assert evaluate.main(command) == 0 and capsys.readouterr().err == ""
    assert records(folder) == records(done / "fastkv")


def test_a_torn_line_in_the_middle_is_refused_with_its_number(again, capsys):
    folder, command = again
    cut(folder, 2)
    before = files(folder)
    assert evaluate.main(command) == 2
    assert_one_line(capsys, "part-0-1.jsonl, line 2, is damaged")
    assert files(folder) == before


def test_a_second_process_is_refused_while_the_first_writes(again, done, capsys):
    folder, command = again
    cut(folder, 3)
    before = files(folder)
    with locks.held(epath.Path(folder), 0, 1):
        assert evaluate.main(command) == 2
        assert_one_line(capsys, f"fastkv is in use by process {os.getpid()} on ")
    assert files(folder) == before
    assert evaluate.main(command) == 0 and records(folder) == records(done / "fastkv")


def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(tmp_path, needles, capsys):
    command = [*needles, "--quiet", "--save-prompts", "--output"]
    assert evaluate.main([*command, str(tmp_path / "undisturbed")]) == 0
    whole = (tmp_path / "undisturbed" / "fastkv" / "part-0-1.jsonl").stat().st_size
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole - 100, most))  # files grow no further
    try:
        assert evaluate.main([*command, str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert_one_line(capsys, "out/fastkv/part-0-1.jsonl: File too large")
    kept = (tmp_path / "out" / "fastkv" / "part-0-1.jsonl").read_bytes().splitlines(keepends=True)
    assert len(kept) == 3 and not kept[2].endswith(b"\n")
    assert evaluate.main([*command, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "fastkv" / "part-0-1.jsonl").read_bytes() == b"".join(kept[:2])
    assert records(tmp_path / "out" / "fastkv") == records(tmp_path / "undisturbed" / "fastkv")


def test_an_answer_may_hold_any_character(again):
    folder, command = again
    part = folder / "part-0-1.jsonl"
    record = json.loads(part.read_text().split("\n")[0])
    record["prediction"] = "one\u2028two\x85three"
    part.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    assert evaluate.main(command) == 0


# -------------------------------------------------------------------------------------------------------- refused


def test_a_damaged_data_file_is_named_with_line_and_field(tmp_path, tiny_model, capsys):
    row = {"input": "Who?", "context": "Ann.", "answers": ["Ann"], "length": 3, "dataset": "hotpotqa", "language": "en",
           "all_classes": None, "_id": "1"}  # fmt: skip
    flags = [*QUICK, "--suite", "longbench", "--tasks", "hotpotqa", "--data", str(tmp_path), "--quiet"]
    for line, message in (
        (json.dumps(row)[:30], "hotpotqa.jsonl, line 2: not whole JSON"),
        (json.dumps({**row, "context": None}), "hotpotqa.jsonl, line 2: field 'context' must be text, got null"),
        ('{"input": "Who?"}', "hotpotqa.jsonl, line 2: there is no field 'context'"),
    ):
        (tmp_path / "hotpotqa.jsonl").write_text(f"{json.dumps(row)}\n{line}\n{json.dumps(row)}\n")
        assert evaluate.main([*flags, "--model", str(tiny_model), "--output", str(tmp_path / "out")]) == 2
        assert_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


def test_a_bucket_without_its_package_names_the_extra(needles, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    backend.fsspec_backend._get_filesystem.cache_clear()
    assert evaluate.main([*needles, "--quiet", "--output", "gs://bucket/x"]) == 2
    assert_one_line(capsys, "pip install 'fastkv-jax[gcs]'")
    flags = [*QUICK, "--model", str(tiny_model), "--quiet", "--data", "gs://bucket/x", "--output", str(tmp_path / "o")]
    for suite in (["longbench"], ["ruler", "--lengths", "900"]):
        assert evaluate.main([*flags, "--suite", *suite]) == 2
        assert_one_line(capsys, "pip install 'fastkv-jax[gcs]'")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("suites", "runs", "message"),
    [
        ("3", "[{name: a, method: full}]", "needs the lists 'suites' and 'runs'"),
        ("[{suite: perplexity, lengths: [300]}]", "[]", "needs the lists 'suites' and 'runs'"),
        ("[{suite: perplexity, lengths: 300}]", "[{name: a, method: full}]", "lengths must be a list of int, got 300"),
        ("[{suite: perplexity, words: 300}]", "[{name: a, method: full}]", "a suite has the settings data, depths,"),
        ("[{suite: perplexity, lengths: [300]}]", "[{name: 10, method: full}]", "a run has name, method, preset"),
        ("[{suite: perplexity, lengths: [300]}]", "[{name: a, method: own}]", "unknown method 'own'; there are: full"),
        ("[{suite: perplexity, lengths: [300]}]", "[{name: A 1, method: full}, {name: a-1, method: full}]",
         "each run needs a name that makes a folder of its own; 'a-1' does not"),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_is_one_line(suites, runs, message, tmp_path, tiny_model, capsys):
    (tmp_path / "grid.yaml").write_text(f"suites: {suites}\nruns: {runs}\n")
    flags = [*QUICK, "--suite", str(tmp_path / "grid.yaml"), "--model", str(tiny_model), "--quiet"]
    assert evaluate.main([*flags, "--output", str(tmp_path / "out")]) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


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
        (["--suite", "needle", "--lengths", "300", "--join-timeout", "9"], "--join-timeout belongs to --distributed"),
        (
            ["--suite", "needle", "--lengths", "300", "--distributed", "a:1,2,0", "--join-timeout", "0"],
            "--join-timeout must be > 0, got 0",
        ),
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
