"""The command line at work: answers on stdout, everything else on stderr."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastkv_jax.cli import generate

ROOT = Path(__file__).parent.parent.parent
LONG = "The keeper counted the oars at low tide. " * 20


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, tiny_model):
    """Run the command on the tiny model in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
        Path("stdin").write_bytes(stdin)
        with Path("stdin").open() as pipe, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", pipe)
            code = generate.main(["--model", str(tiny_model), "--no-compile-cache", "-n", "8", *words])
        return (code, *capfd.readouterr())

    return run


def test_only_the_answer_goes_to_stdout(run):
    code, out, err = run("--prompt", "hello")
    assert code == 0 and out.endswith("\n") and len(out) > 1
    assert "fastkv_jax" in err and "preset   default: fastkv tsp_layer=1" in err and "through the chat template" in err
    assert "no compression: prompt < 512, min_prompt_to_compress" in err
    assert run("--prompt", "hello", "--quiet") == (0, out, "")


def test_stdin_file_and_flag_are_the_same_prompt(run):
    _, out, _ = run("--prompt", "one\ntwo")
    Path("one.txt").write_bytes(b"\xef\xbb\xbfone")  # a byte-order mark is no text
    assert run("--prompt-file", "one.txt", "--prompt", "two")[1] == out
    assert run(stdin=b"one\ntwo")[1] == out
    assert run("-", stdin=b"one\ntwo")[1] == out
    assert run("--prompt-file", "-", stdin=b"one\ntwo")[1] == out


def test_words_of_a_prompt_are_not_flags(run):
    counts = [json.loads(run("--prompt=" + text, "--raw", "--json")[1])["prompt_tokens"] for text in ("-- a_b", "ab")]
    assert counts == [6, 2]


def test_both_spellings_of_flags_work(run):
    assert run("--prompt", "hi", "--max_new_tokens", "3", "--json")[0] == 0


def test_json_holds_everything_and_is_valid(run):
    code, out, _ = run("--prompt", LONG, "--json", "--retention-rate", "0.1")
    answer = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    n = answer["prompt_tokens"]
    assert answer["kv"] == [
        {"first_layer": 0, "last_layer": 1, "tokens": n, "kept": int(n * 0.1)},
        {"first_layer": 2, "last_layer": 3, "tokens": int(n * 0.2), "kept": int(int(n * 0.2) * (0.1 / 0.2))},
    ]
    assert answer["finish_reason"] in ("length", "eos") and len(answer["token_ids"]) == answer["generated_tokens"]
    assert answer["settings"]["retention_rate"] == 0.1 and answer["settings"]["method"] == "fastkv"
    assert set(answer["timings"]) == {"compile_s", "prefill_s", "decode_s"}
    assert answer["peak_memory_bytes"] is None and answer["versions"]["jax"]


def test_the_paper_preset_compresses_short_prompts_and_judges_by_the_end_of_the_prompt(run):
    _, out, err = run("--prompt", LONG[:200], "--json", "--preset", "paper")
    n = json.loads(out)["prompt_tokens"]
    assert json.loads(out)["kv"][0]["kept"] == int(n * 0.1)
    assert "preset   paper: fastkv" in err and "window ends with the prompt" in err


def test_a_flag_replaces_its_partner_in_the_preset(run):
    settings = json.loads(run("--prompt", LONG, "--json", "--capacity", "64", "--tsp-length", "100")[1])["settings"]
    assert (settings["capacity"], settings["retention_rate"]) == (64, None)
    assert (settings["tsp_length"], settings["tsp_rate"]) == (100, None)


def test_full_context_is_a_method_too(run):
    _, out, err = run("--prompt", LONG, "--json", "--method", "full")
    answer = json.loads(out)
    assert answer["kv"][0]["kept"] == answer["prompt_tokens"] and "(method full)" in err


def test_raw_leaves_the_template_out_and_system_and_prefill_go_into_it(run):
    def count(*words: str) -> int:
        return json.loads(run(*words, "--json")[1])["prompt_tokens"]

    plain = count("--prompt", "hi")
    assert count("--prompt", "hi", "--raw") == 2
    assert count("--prompt", "hi", "--prefill", "Well") == plain + 4
    assert count("--prompt", "hi", "--system", "Be kind") > plain + 7
    assert count("--prompt", "<|end|>", "--raw") == 1
    assert count("--prompt", "<|end|>", "--raw", "--split-special-tokens") == 7


def test_stop_strings_end_the_answer_and_are_not_printed(run):
    text = json.loads(run("--prompt", "hello", "--json", "--raw")[1])["text"]
    stop = text[3:5]
    answer = json.loads(run("--prompt", "hello", "--json", "--raw", "--stop", stop)[1])
    assert answer["finish_reason"] == "stop" and answer["text"] == text[: text.index(stop)]


def test_a_seed_makes_sampling_reproducible(run):
    words = ("--prompt", "hello", "--temperature", "50", "--top-k", "90", "--seed")
    five, again, six = (json.loads(run(*words, seed, "--json")[1])["token_ids"] for seed in ("5", "5", "6"))
    assert five == again != six


@pytest.mark.parametrize("side", ("left", "middle", "right"))
def test_truncation_cuts_the_words_and_keeps_the_template(run, side):
    code, out, err = run("--prompt", LONG, "--max-seq-len", "200", "--truncate", side, "--json")
    assert code == 0 and json.loads(out)["prompt_tokens"] == 192
    assert f"(--truncate {side})" in err


def test_a_dry_run_prints_the_plan_and_loads_nothing(run, monkeypatch):
    from fastkv_jax import checkpoint

    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    code, out, _ = run("--prompt", LONG, "--dry-run")
    assert code == 0 and "weights" in out and "after TSP at layer 1" in out and "cache" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gemfilter", "--prefill-chunk", "64"], "GemFilter reads the prompt twice: it cannot read chunks"),
        (["--method", "asl", "--prefill-chunk", "64"], "ASL looks at whole prompts: it cannot read chunks"),
        (["--prefill-chunk", "0"], "prefill_chunk must be >= 1, got 0"),
    ],
)
def test_chunks_that_cannot_be_are_refused_before_weights_load(run, monkeypatch, words, message):
    from fastkv_jax import checkpoint

    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    code, out, err = run("--prompt", LONG, *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_an_answer_after_chunks(run):
    code, out, _ = run("--prompt", LONG, "--prefill-chunk", "100", "--method", "full", "--json")
    whole = json.loads(run("--prompt", LONG, "--method", "full", "--json")[1])
    assert code == 0 and json.loads(out)["text"] == whole["text"]


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_batch_answers_each_row_as_it_would_be_alone(run):
    batch = [
        {"id": "a", "prompt": "hello"},
        {"prompt": LONG, "system": None, "prefill": ""},
        {"id": 7, "prompt": "hello", "system": "Be kind", "prefill": "Well", "ignored": 1},
    ]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, batch)) + "\n\n")
    code, out, err = run("--input", "in.jsonl", "--quiet")
    answers = rows(out)
    assert code == 0 and err == "" and [row["id"] for row in answers] == ["a", 2, 7]
    alone = ("--prompt", "hello"), ("--prompt", LONG), ("--prompt", "hello", "--system", "Be kind", "--prefill", "Well")
    for row, words in zip(answers, alone, strict=True):
        single = json.loads(run(*words, "--json")[1])
        for field in ("text", "finish_reason", "prompt_tokens", "generated_tokens"):
            assert row[field] == single[field]
        assert set(row["timings"]) == {"compile_s", "prefill_s", "decode_s"}


def test_a_row_that_does_not_fit_is_recorded_and_the_others_are_answered(run):
    Path("in.jsonl").write_text(
        json.dumps({"id": 1, "prompt": LONG * 9}) + "\n" + json.dumps({"id": 2, "prompt": "hi"})
    )
    code, out, _ = run("--input", "in.jsonl", "--output", "out.jsonl")
    answers = rows(Path("out.jsonl").read_text())
    assert code == 1 and out == "" and "max_position_embeddings" in answers[0]["error"] and "text" in answers[1]


def test_an_old_output_is_replaced_only_by_a_complete_one(run):
    Path("in.jsonl").write_text('{"prompt": "hi"}')
    Path("out.jsonl").write_text("old")
    assert run("--input", "in.jsonl", "--output", "out.jsonl", "--overwrite")[0] == 0
    assert rows(Path("out.jsonl").read_text())[0]["id"] == 1
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "out.jsonl", "stdin"]


def start(*words: str, cwd: Path) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    listens = ["env", "--default-signal=INT"]  # a shell's background jobs ignore Ctrl-C, and so would their children
    command = [*listens, sys.executable, str(ROOT / "scripts" / "generate.py"), "--no-compile-cache", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


def test_ctrl_c_prints_what_there_is_and_the_stats(tiny_model, tmp_path):
    endless = shutil.copytree(tiny_model, tmp_path / "endless")
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    words = ("--model", str(endless), "--prompt", "hello", "-n", "4000", "--temperature", "1", "--raw")
    with start(*words, cwd=tmp_path) as process:
        first = process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and first and out.endswith(b"\n")
    assert b"stop: interrupted" in err and b"Traceback" not in err


def test_sigterm_keeps_the_lines_that_are_done(tiny_model, tmp_path):
    batch = [{"id": i, "prompt": "hello " * i} for i in range(1, 400)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, batch)))
    words = ("--model", str(tiny_model), "--input", "in.jsonl", "--output", "out.jsonl", "-n", "200")
    with start(*words, cwd=tmp_path) as process:
        deadline = time.monotonic() + 60
        output = tmp_path / "out.jsonl"
        while time.monotonic() < deadline and not (output.exists() and output.read_text().count("\n") > 1):
            time.sleep(0.1)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and b"error: terminated" in err and b"Traceback" not in err
    assert [row["id"] for row in rows(output.read_text())][:2] == [1, 2]


def test_a_reader_that_leaves_early_is_no_error(tiny_model, tmp_path):
    words = ("--model", str(tiny_model), "--prompt", "hello", "-n", "2000", "--temperature", "1", "--raw", "--quiet")
    with start(*words, cwd=tmp_path) as process:
        process.stdout.read(1)
        process.stdout.close()
        process.stdin.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0 and err == b""


# ------------------------------------------------------------------------------------------- what ends an answer

START, END = 0, 1  # the tokenizer's <|start|> and <|end|>


@pytest.mark.filterwarnings("always::fastkv_jax.errors.ModelWarning")
def test_files_that_disagree_end_an_answer_all_the_same_and_it_is_said_once(run, always_says):
    """The configuration names another token than the tokenizer and its template end a turn with."""
    folder = always_says(END, config={"eos_token_id": 5}, generation={"eos_token_id": 5})
    code, out, err = run("--model", str(folder), "--prompt", "hi", "--json")
    answer = json.loads(out)
    assert (code, answer["token_ids"], answer["finish_reason"]) == (0, [END], "eos")
    (told,) = answer["warnings"]
    assert err.count(told) == 1 and "different end tokens" in told and "<|end|> (1)" in told
    code, out, err = run("--model", str(folder), "--prompt", "hi", "--json", "--quiet")
    assert (code, err, json.loads(out)["warnings"]) == (0, "", [told])


def test_a_stop_that_is_a_special_token_ends_an_answer(run, always_says):
    folder = str(always_says(START))
    code, out, _ = run("--model", folder, "--prompt", "hi", "--json", "--quiet")
    assert json.loads(out)["finish_reason"] == "length"
    code, out, _ = run("--model", folder, "--prompt", "hi", "--json", "--quiet", "--stop", "<|start|>")
    answer = json.loads(out)
    assert (code, answer["token_ids"], answer["text"], answer["finish_reason"]) == (0, [START], "", "stop")
    code, out, err = run("--model", folder, "--prompt", "hi", "--stop", "so<|start|>")
    assert (code, out) == (2, "") and "mixes the special token <|start|> with text" in err


def test_equal_prompts_sample_different_answers_the_same_again_for_the_same_seed(run):
    Path("four.jsonl").write_text('{"prompt": "hello"}\n' * 4)
    hot = ("--temperature", "50", "--quiet")

    def texts(*words: str) -> list[str]:
        code, out, _ = run("--input", "four.jsonl", *hot, *words)
        assert code == 0
        return [json.loads(line)["text"] for line in out.splitlines()]

    found = texts()
    assert len(set(found)) == 4 and texts() == found and texts("--seed", "1") != found
    assert run("--prompt", "hello", *hot)[1].rstrip("\n") == found[0].rstrip("\n")


def test_what_the_template_is_told(run, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("told") / "model"
    shutil.copytree(tiny_model, folder)
    template = (
        "{{ strftime_now('%Y') }}{{ messages[0].content }}{% if thinks is defined %}{{ thinks }}{% endif %}<|end|>"
    )
    (folder / "chat_template.jinja").write_text(template)
    words = ("--model", str(folder), "--prompt", "hi", "--json", "--quiet")

    def tokens(*more: str) -> int:
        return json.loads(run(*words, *more)[1])["prompt_tokens"]

    assert tokens() == len("0000hi") + 1 and tokens("--date", "2024-07-26") == tokens()
    assert tokens("--chat-template-args", '{"thinks": false}') == tokens() + len("False")
    for more, message in (
        (["--chat-template-args", "[]"], "must be a JSON object"),
        (["--chat-template-args", '{"tokenize": true}'], "'tokenize' is set by fastkv_jax"),
        (["--date", "soon"], "YYYY-MM-DD"),
        (["--raw", "--date", "2024-07-26"], "none is used here"),
    ):
        code, out, err = run(*words, *more)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.filterwarnings("always::fastkv_jax.errors.ModelWarning")
def test_a_tokenizer_may_be_brought_along(run, tiny_model, smollm2_path):
    own = run("--prompt", "hello", "--quiet")
    assert run("--prompt", "hello", "--quiet", "--tokenizer", str(tiny_model)) == own
    code, out, err = run("--prompt", "hello", "--quiet", "--tokenizer", str(smollm2_path))
    assert (code, out) == (3, "") and "49152 ids, the model's embedding only" in err


# --------------------------------------------------------------------------------- one document, many questions


def test_a_saved_document_answers_as_one_long_prompt_does(run):
    Path("document.txt").write_text(LONG)
    whole = run("--prompt-file", "document.txt", "--prompt", "Who?", "--method", "full", "--quiet")
    assert whole[0] == 0
    words = ("--prompt-file", "document.txt", "--method", "full", "--save-cache", "d.kv")
    code, out, err = run(*words, "-n", "0")
    assert (code, out) == (0, "") and "reading" in err and Path("d.kv").exists()
    code, out, err = run("--load-cache", "d.kv", "--prompt", "Who?")
    assert (code, out) == (0, whole[1]) and "tokens read by FullKV()" in err
    Path("questions.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": "Who?", "prefill": "It"}\n{"prompt": "When?"}\n')
    code, out, _ = run("--load-cache", "d.kv", "--input", "questions.jsonl", "--quiet")
    answers = [json.loads(line)["text"] for line in out.splitlines()]
    assert code == 0 and len(answers) == 3 and answers[0] == whole[1].rstrip("\n")


def test_saving_a_cache_may_answer_too(run):
    code, out, _ = run("--prompt", LONG, "--method", "full", "--save-cache", "d.kv", "--quiet")
    assert code == 0 and out == run("--prompt", LONG, "--method", "full", "--quiet")[1]
    code, out, err = run("--prompt", LONG, "--raw", "--save-cache", "d.kv")
    assert code == 2 and "give -n 0" in err


def test_a_compressed_document_is_saved_smaller(run):
    sizes = []
    for method in (("--method", "full"), ("--method", "keydiff", "--retention-rate", "0.2")):
        assert run("--prompt", LONG, *method, "--save-cache", "d.kv", "-n", "0", "--quiet")[0] == 0
        sizes.append(Path("d.kv").stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]
    assert run("--load-cache", "d.kv", "--prompt", "Who?", "--quiet")[0] == 0
    code, out, err = run("--load-cache", "d.kv", "--prompt", "Who?", "--raw")
    assert (code, out) == (2, "") and "was read with a chat template" in err


def test_what_was_kept_can_be_seen(run):
    code, _, err = run("--prompt", LONG, "--retention-rate", "0.2", "--explain", "seen.html")
    assert code == 0 and "explain" in err and "<html" in Path("seen.html").read_text()
    assert run("--prompt", LONG, "--explain", "seen.png", "--quiet")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--explain", "seen.pdf"], "its name must end in .png or .html"),
        (["--explain", "no/seen.png"], "there is no folder"),
        (["--save-cache", "."], "it is a folder"),
        (["--save-cache", "a", "--load-cache", "b"], "no place for"),
        (["--save-cache", "a", "--prefill", "x"], "no place for"),
        (["--load-cache", "a"], "a: no such cache file"),
        (["--load-cache", "a", "--kernel-size", "5"], "--kernel-size has no place beside it"),
        (["--load-cache", "a", "--chat-template-args", "{}"], "--chat-template-args has no place beside it"),
        (["--load-cache", "a", "--date", "2024-02-29"], "--date has no place beside it"),
        (["--load-cache", "a", "--method", "snapkv"], "--method has no place beside it"),
        (["--load-cache", "a", "--preset", "paper"], "--preset has no place beside it"),
        (["--load-cache", "a", "--truncate", "left"], "--truncate has no place beside it"),
        (["--load-cache", "a", "--prefill-chunk", "64"], "--prefill-chunk has no place beside it"),
        (["--load-cache", "stdin"], "not a valid safetensors file"),
        (["-n", "0"], "max_new_tokens must be >= 1"),
    ],
)
def test_what_cannot_be_saved_loaded_or_drawn_is_one_line(run, words, message):
    code, out, err = run("--prompt", "hi", *words)
    assert code in (2, 3) and out == "" and message in err and err.count("\n") == 1
    assert sorted(path.name for path in Path(".").iterdir()) == ["stdin"]
