"""Every mistake is answered by one line on stderr and its exit code, before weights load, with nothing on stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkv_jax import checkpoint
from fastkv_jax.cli import generate

USAGE, BAD_MODEL, DEVICE = 2, 3, 4


@pytest.fixture
def fails(monkeypatch, capfd, tmp_path, smollm2_path):
    """Run the command and return (exit code, its one line on stderr); weights must not be touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))

    def run(*words: str, stdin: bytes = b"") -> tuple[int, str]:
        Path("stdin").write_bytes(stdin)
        with Path("stdin").open() as pipe, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", pipe)
            try:
                code = generate.main([*words, "--no-compile-cache"])
            except SystemExit as left:
                code = left.code
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return code, err[len("error: ") :].strip()

    return run


SETTINGS = {
    "--temperature -1": "temperature must be finite and >= 0, got -1.0",
    "--temperature nan": "temperature must be finite and >= 0, got nan",
    "--top-p 0": "top_p must be in (0, 1], got 0.0",
    "--top-p 1.5": "top_p must be in (0, 1], got 1.5",
    "--top-k -1": "top_k must be >= 0 (0 = off), got -1",
    "--min-p 2": "min_p must be in [0, 1], got 2.0",
    "--max-new-tokens 0": "max_new_tokens must be >= 1, got 0",
    "--seed -1": "seed must be in 0 ... 2**32 - 1, got -1",
    "--seed 4294967296": "seed must be in 0 ... 2**32 - 1, got 4294967296",
    "--stop=": "a stop string must not be empty",
    "--stream-interval 0": "stream_interval must be >= 1, got 0",
    "--max-seq-len 1": "max_seq_len must be >= 2, got 1",
    "--max-seq-len 9000": "max_seq_len 9000 exceeds the model's max_position_embeddings, 8192",
    "--window-size 0": "window_size must be an integer >= 1, got 0",
    "--kernel-size 4": "kernel_size must be an odd integer >= 1, got 4",
    "--kernel-size -1": "kernel_size must be an odd integer >= 1, got -1",
    "--pooling sum": "argument --pooling: invalid choice: 'sum' (choose from 'max', 'avg')",
    "--window-size 16 --capacity 8": "window_size (16) must not exceed capacity (8)",
    "--tsp-length 4": "window_size (16) must not exceed tsp_length (4)",
    "--tsp-length 1000 --capacity 2000": "tsp_length (1000) < capacity (2000): later layers cannot hold the budget",
    "--tsp-layer 40": "tsp_layer 40 is outside 0…28 for a 30-layer model",
    "--tsp-layer 29": "tsp_layer 29 is outside 0…28 for a 30-layer model",
    "--tsp-layer -1": "tsp_layer must be an integer >= 0, got -1",
    "--tsp-rate 0": "tsp_rate must be in (0, 1], got 0.0",
    "--tsp-rate nan": "tsp_rate must be in (0, 1], got nan",
    "--retention-rate 1.5": "retention_rate must be in (0, 1], got 1.5",
    "--retention-rate 0.1 --capacity 64": "--retention-rate 0.1 and --capacity 64 exclude each other; give one",
    "--tsp-rate 0.1 --tsp-length 64": "--tsp-rate 0.1 and --tsp-length 64 exclude each other; give one",
    "--method full --tsp-layer 3": "--tsp-layer 3 is not a setting of method 'full'",
    "--min-prompt-to-compress -1": "min_prompt_to_compress must be an integer >= 0, got -1",
    "--mem-fraction 2": "--mem-fraction must be in (0, 1], got 2.0",
    "--raw --system x": "--raw has no place for --system or --prefill",
    "--output x.jsonl": "--output needs --input; a single answer goes to stdout",
    "--max-new-token 3": "unknown argument '--max-new-token'; did you mean --max-new-tokens?",
    "--nonsense": "unknown argument '--nonsense'; see --help",
    "--temperature hot": "argument --temperature/--temp: invalid float value: 'hot'",
    "--temperature": "argument --temperature/--temp: expected one argument",
    "--chat --raw": "argument --raw: not allowed with argument --chat",
}


@pytest.mark.parametrize("flags", SETTINGS)
def test_settings_out_of_range_are_named_with_value_and_range(fails, flags):
    assert fails("--prompt", "hi", *flags.split()) == (USAGE, SETTINGS[flags])


def test_an_unknown_preset_is_answered_with_the_names_there_are(fails):
    code, line = fails("--prompt", "hi", "--preset", "nope")
    assert code == USAGE and "smollm2-135m" in line and "paper" in line


@pytest.mark.parametrize("words", (["--prompt", ""], ["--prompt", " \n"], ["--prompt-file", "empty"], []))
def test_an_empty_prompt_is_refused(fails, words):
    Path("empty").touch()
    assert fails(*words) == (USAGE, "prompt is empty")


@pytest.mark.parametrize(
    ("data", "line"),
    (
        (b"hello \xff", "bad.txt is not UTF-8 (byte 0xff at 6)"),
        (b"a\0b", "bad.txt is not text (NUL byte at 1)"),
    ),
)
def test_a_file_that_is_no_text_is_refused(fails, data, line):
    Path("bad.txt").write_bytes(data)
    assert fails("--prompt-file", "bad.txt") == (USAGE, line)
    assert fails(stdin=data) == (USAGE, line.replace("bad.txt", "stdin"))


def test_a_missing_prompt_file_is_named(fails):
    assert fails("--prompt-file", "nosuch.txt") == (USAGE, "cannot read nosuch.txt: No such file or directory")


def test_a_prompt_too_long_is_refused_with_all_the_numbers(fails):
    code, line = fails("--prompt", "hi", "--max-new-tokens", "9000")
    assert code == USAGE
    assert line == (
        "prompt has 31 tokens + 9,000 new > 8,192 (max_position_embeddings). "
        "Use --truncate middle, a shorter prompt, or fewer new tokens."
    )
    code, line = fails("--prompt", "hi", "--max-seq-len", "31", "--max-new-tokens", "1")
    assert code == USAGE and "prompt has 31 tokens + 1 new > 31 (--max-seq-len)" in line


@pytest.mark.parametrize(
    ("line", "complaint"),
    (
        ("{bad", "rows.jsonl line 2 is not JSON"),
        ("[1]", "rows.jsonl line 2 must be an object with a prompt, found list"),
        ('{"id": 1}', "rows.jsonl line 2: field 'prompt' is missing"),
        ('{"prompt": ""}', "rows.jsonl line 2: prompt is empty"),
        ('{"prompt": 3}', "rows.jsonl line 2: prompt must be a string, found 3"),
        ('{"prompt": "x", "system": []}', "rows.jsonl line 2: system must be a string, found []"),
        ('{"prompt": "x", "id": NaN}', "rows.jsonl line 2: id must be a string or a number, found nan"),
        ('{"prompt": "x", "id": true}', "rows.jsonl line 2: id must be a string or a number, found True"),
        ('{"prompt": "\\ud800"}', "rows.jsonl line 2: prompt is not UTF-8"),
        ("[" * 100_000, "rows.jsonl line 2 is not JSON"),
        ('{"prompt": "x", "id": []}', "rows.jsonl line 2: id must be a string or a number, found []"),
    ),
)
def test_a_bad_row_of_a_batch_is_named_by_its_line(fails, line, complaint):
    Path("rows.jsonl").write_text(json.dumps({"prompt": "fine"}) + "\n" + line + "\n")
    code, said = fails("--input", "rows.jsonl")
    assert code == USAGE and said.startswith(complaint)


def test_an_output_that_cannot_be_is_refused_before_anything_runs(fails):
    Path("rows.jsonl").write_text('{"prompt": "fine"}')
    Path("there").touch()
    Path("folder").mkdir()
    for output, complaint in (("there", "exists; give --overwrite"), ("folder", "is a folder"), ("no/x", "no folder")):
        code, line = fails("--input", "rows.jsonl", "--output", output)
        assert code == USAGE and complaint in line


@pytest.mark.parametrize("source", ("nosuch", "./nosuch", "/nosuch/model.gguf", "empty-folder", "text.txt"))
def test_a_model_that_is_none_is_a_model_error(fails, source):
    Path("empty-folder").mkdir()
    Path("text.txt").write_text("hello")
    code, line = fails("--prompt", "hi", "--model", source)
    assert code == BAD_MODEL and source.removeprefix("./") in line and "smollm2-135m" in line


def test_a_model_without_chat_template_refuses_chat(fails, tmp_path, smollm2_path):
    from fastkv_jax.text import load_tokenizer

    root = Path(__file__).parent.parent / "golden" / "transformers" / "tied"
    for file in root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    code, line = fails("--prompt", "hi", "--model", str(tmp_path))
    assert code == BAD_MODEL and "tokenizer" in line
    tokenizer = load_tokenizer(smollm2_path)
    tokenizer.save_pretrained(tmp_path)
    code, line = fails("--prompt", "hi", "--model", str(tmp_path))
    assert code == BAD_MODEL and line == "the tokenizer has 49152 ids, the model's embedding only 96 rows"


@pytest.mark.parametrize(
    "words",
    [
        ("scripts/generate.py", "--prompt", "hi"),
        ("scripts/convert_checkpoint.py", "{model}", "{out}"),
        ("scripts/compare_methods.py", "--model", "{model}"),
        ("-m", "fastkv_jax", "lm_eval", "--model", "fastkv_jax", "--model_args", "model={model}", "--tasks", "x"),
    ],
)
def test_jax_platforms_that_are_missing_are_one_line(words, tiny_model, tmp_path):
    """Some plugins are only missed when the first array is made, deep inside the command."""
    command = [word.format(model=tiny_model, out=tmp_path / "out") for word in words]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
    )  # fmt: skip
    assert done.returncode == DEVICE and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no CUDA device visible to JAX")


@pytest.mark.parametrize("platform", ("gpu", "tpu"))
def test_a_platform_that_is_missing_is_never_replaced_by_the_cpu(platform):
    script = Path(__file__).parent.parent.parent / "scripts" / "generate.py"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    missing = {"gpu": "no CUDA device visible to JAX", "tpu": "no TPU visible to JAX"}[platform]
    contradiction = f"--platform {platform} contradicts JAX_PLATFORMS=cpu"
    for extra, expected in (({}, missing), ({"JAX_PLATFORMS": "cpu"}, contradiction)):
        done = subprocess.run(
            [sys.executable, script, "--platform", platform, "--prompt", "hi"],
            capture_output=True, text=True, env=environment | extra, check=False,
        )  # fmt: skip
        assert done.returncode == DEVICE and done.stdout == ""
        assert done.stderr.startswith(f"error: {expected}") and done.stderr.count("\n") == 1
