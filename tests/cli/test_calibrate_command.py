"""The calibration command: tables on stdout, progress on stderr, a preset that the other commands take."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fastkv_jax import checkpoint
from fastkv_jax.cli import calibrate, commands
from fastkv_jax.cli.flags import settings
from fastkv_jax.cli.generate import parser as generate_parser
from fastkv_jax.methods import presets

FEW = ("--windows", "4", "--kernels", "3,5", "--layers", "0-2", "--finalists", "1", "--max-new-tokens", "4")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, tiny_model):
    """Run the command on the tiny model in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int | str | None, str, str]:
        try:
            code = calibrate.main(["--model", str(tiny_model), "--no-compile-cache", *words])
        except SystemExit as left:
            code = left.code
        return (code, *capfd.readouterr())

    return run


def test_a_table_a_preset_and_a_picture(run):
    made = ("--count", "2", "--tokens", "100-110", "--output", "mine.yaml", "--plot", "curves.png")
    code, out, err = run(*FEW, *made)
    assert code == 0 and "samples  2, " in err and "2 hold their answer" in err and "measuring" in err
    assert "  window 4 kernel 3 " in out and "  window 4 kernel 5 " in out and out.count("%  ") >= 3
    assert "full context  0 of 2 right" in out  # its weights are random
    chosen = yaml.safe_load(Path("mine.yaml").read_text())["preset"]
    line = f"chosen        tsp_layer {chosen['tsp_layer']}, window 4 kernel {chosen['kernel_size']}: 0 right"
    assert line in out and "no answers to count" in out and out.splitlines()[-1].startswith("prefill  ")
    with Image.open("curves.png") as picture:
        assert picture.format == "PNG"
    given = generate_parser().parse(["--preset", "mine.yaml"])
    settings.check(given)
    preset, method = settings.method(given, "tiny", 4)
    assert preset == presets.load("mine.yaml") and method.kernel_size == chosen["kernel_size"]
    for flag, name in (("--output", "mine.yaml"), ("--plot", "curves.png")):
        assert run(flag, name) == (2, "", f"error: {flag} {name} exists; give --overwrite to replace it\n")


def test_rows_from_a_file_and_json(run):
    row = {"prompt": "The lamp is in the cellar.\u2028" * 20 + "Where is it?", "answer": "cellar"}
    lines = [json.dumps(row, ensure_ascii=False), "", json.dumps({**row, "prefill": "In the"})]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n")
    code, out, err = run("--input", "rows.jsonl", *FEW, "--json", "--quiet", "--timed")
    answer = json.loads(out)
    assert code == 0 and err == "" and out.count("\n") == 1
    assert answer["calibration"]["samples"] == 2 and answer["calibration"]["layers"] == [0, 1, 2]
    assert answer["preset"]["window_size"] == 4 and answer["calibration"]["prefill_seconds"]["full"] > 0


def test_it_is_one_of_the_commands(capfd):
    with pytest.raises(SystemExit) as left:
        commands.main(["calibrate", "--help"])
    assert left.value.code == 0 and "--tolerance" in capfd.readouterr().out


MISTAKES = {
    "--layers 40": "tsp_layer 40 is outside 0…2 for a 4-layer model",
    "--layers x": "argument --layers: invalid integers value: 'x'",
    "--windows 0": "window_size must be an integer >= 1, got 0",
    "--kernels 7,8": "kernel_size must be an odd integer >= 1, got 8",
    "--tsp-rate 0": "tsp_rate must be in (0, 1], got 0.0",
    "--tolerance -1": "tolerance must be >= 0, got -1.0",
    "--seed 4294967296": "seed must be in 0 ... 2**32 - 1, got 4294967296",
    "--chat-template-args 3": "chat template arguments must be a JSON object, got '3'",
    "--count 0": "count must be >= 1, got 0",
    "--tokens 50": "tokens must rise from >= 100, got 50-50",
    "--tokens 300-200": "tokens must rise from >= 100, got 300-200",
    "--haystack .": "--haystack . holds no .txt files",
    "--input none.jsonl": "cannot read none.jsonl: No such file or directory",
    "--input bad.jsonl": "bad.jsonl is not JSON lines: Expecting value: line 1 column 1 (char 0)",
    "--input third.jsonl": "third.jsonl is not JSON lines: Expecting value: line 3 column 5 (char 21)",
    "--input .": ". is a folder, not a text file",
    "--input list.jsonl": "each line of list.jsonl must be an object with prompt and answer",
    "--input row.jsonl": "row 1: answer must be a text, found None",
    "--input row.jsonl --count 3": "--count and --input exclude each other",
    "--output preset.json": "cannot write preset.json: its name must end in .yaml",
    "--plot no/curves.png": "cannot write no/curves.png: there is no folder {here}/no",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line_before_weights_load(flags, run, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    row = '{"prompt": "x"}'
    for name, text in (("bad", "nonsense"), ("third", f"{row}\n\n[1, nonsense"), ("list", "[1]"), ("row", row)):
        Path(f"{name}.jsonl").write_text(text)
    assert run("--quiet", *flags.split()) == (2, "", f"error: {MISTAKES[flags].format(here=Path.cwd())}\n")
