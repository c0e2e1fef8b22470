"""lm-evaluation-harness's own command line with a model of ours: local tasks, no network, no PyTorch."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import fastkv_jax as fk
from fastkv_jax.cli import evaluate
from fastkv_jax.evals import gen_kwargs, prompts
from fastkv_jax.evals.lm_eval_model import FastKVModel
from fastkv_jax.evals.protocols import UPSTREAM
from fastkv_jax.evals.records.records import merged
from fastkv_jax.evals.suites import longbench
from fastkv_jax.methods import presets

QUESTIONS = [{"question": "one and one?", "answer": "two"}, {"question": "the sea is?", "answer": "salt"}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A generation and a multiple-choice task over a local JSONL file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "Question: {{{{question}}}} Answer:"
"""
    (folder / "says.yaml").write_text(
        "task: says" + common + 'doc_to_target: "{{answer}}"\noutput_type: generate_until\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}\nmetric_list: [{metric: exact_match}]\n'
    )
    (folder / "chooses.yaml").write_text(
        "task: chooses" + common + 'doc_to_choice: ["two", "salt"]\ndoc_to_target: "{{answer}}"\n'
        "output_type: multiple_choice\nmetric_list: [{metric: acc}]\n"
    )
    return folder


def harness(tiny_model, tasks: Path, *words: str) -> subprocess.CompletedProcess:
    model = f"model={tiny_model},method=snapkv,capacity=20,window_size=4,min_prompt_to_compress=0"
    command = [sys.executable, "-m", "fastkv_jax", "lm_eval", "--model", "fastkv_jax", "--model_args", model]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tasks / "cache")}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300, cwd=tasks)


def test_the_harness_ends_with_its_table(tiny_model, tasks, tmp_path):
    out, words = tmp_path / "out", ["--include_path", str(tasks), "--tasks", "says,chooses", "--log_samples"]
    done = harness(tiny_model, tasks, *words, "--output_path", str(out), "--use_cache", str(tmp_path / "db"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact_match" in done.stdout and "|chooses" in done.stdout
    (results,) = out.rglob("results_*.json")
    assert set(json.loads(results.read_text())["results"]) == {"says", "chooses"}
    (said,) = out.rglob("samples_says_*.jsonl")
    assert len(said.read_text().splitlines()) == len(QUESTIONS)
    assert list(tmp_path.glob("db*"))  # what an interrupted run goes on from


def test_a_setting_that_cannot_be_is_one_line(tiny_model, tasks):
    done = harness(tiny_model, tasks, "--include_path", str(tasks), "--tasks", "says", "--gen_kwargs", "num_beams=4")
    assert done.returncode == 2 and "num_beams=4 is not supported" in done.stderr.splitlines()[-1]


def test_what_the_command_line_asks_of_answers_is_refused_before_likelihoods_run(tiny_model, tasks, tmp_path):
    words = ("--include_path", str(tasks), "--tasks", "chooses,says")
    done = harness(tiny_model, tasks, *words, "--gen_kwargs", "top_k=-1,temperature=1")
    assert done.returncode == 2 and "Running loglikelihood" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: gen_kwargs top_k must be an integer >= 0, got -1.0"
    config = tmp_path / "run.yaml"
    config.write_text("gen_kwargs: {seed: 4294967296}\n")
    done = harness(tiny_model, tasks, *words, "--config", str(config))
    assert done.returncode == 2 and "Running loglikelihood" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: seed must be in 0 ... 2**32 - 1, got 4294967296"


def test_a_model_that_is_not_there_is_a_model_error(tasks):
    done = harness(tasks / "nothing", tasks, "--include_path", str(tasks), "--tasks", "says")
    assert done.returncode == 3 and done.stderr.splitlines()[-1].startswith("error: ")


# ----------------------------------------------------------------------------------------------------- likelihood

CONTEXT = "The keeper counted the oars at low tide. " * 4 + "The lamp was lit."


def likelihoods(model: FastKVModel, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)


def log_softmax(result) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(result.logits[0]))


def test_a_likelihood_under_full_context_is_that_of_one_long_prompt(tiny_model):
    model, tokenizer = fk.load_model(tiny_model, dtype="float32"), fk.load_tokenizer(tiny_model)
    full = FastKVModel(str(tiny_model), method="full")

    def by_hand(context: str, continuation: str) -> tuple[float, bool]:
        before, after = (tokenizer.encode(words) for words in (context, continuation))
        total, greedy = 0.0, True
        for i, token in enumerate(after):
            found = log_softmax(fk.prefill(model, [before + after[:i]], method=fk.FullKV(), max_new_tokens=0))
            total, greedy = total + found[token], greedy and found.argmax() == token
        return total, greedy

    def greedy(context: str) -> str:
        made = fk.generate(model, [tokenizer.encode(context)], method=fk.FullKV(), max_new_tokens=3)
        return tokenizer.decode(np.asarray(made.tokens)[0])

    # Tokens are bytes, and only some of what a random model says is text
    said = ((context, greedy(context)) for context in (f"{CONTEXT}{i}" for i in itertools.count()))
    chosen = next((context, answer) for context, answer in said if answer.isascii() and answer[0] > " ")
    pairs = [(CONTEXT, " salt"), chosen, (chosen[0], chosen[1][:2] + "\x7f"), (CONTEXT, " the sea"), (CONTEXT, "s")]
    found = likelihoods(full, *pairs)
    for pair, (likelihood, is_greedy) in zip(pairs, found, strict=True):
        total, expected = by_hand(*pair)
        assert likelihood == pytest.approx(total, rel=1e-4) and is_greedy == expected == (pair == chosen)
    assert likelihoods(full, (CONTEXT + " ", "salt")) == found[:1]  # a space between them belongs to the continuation


def test_a_likelihood_under_compression_is_that_after_the_compressed_context(tiny_model):
    settings = {"capacity": 20, "window_size": 4, "min_prompt_to_compress": 0}
    [(likelihood, _)] = likelihoods(FastKVModel(str(tiny_model), method="snapkv", **settings), (CONTEXT, " salt"))
    model, tokenizer = fk.load_model(tiny_model, dtype="float32"), fk.load_tokenizer(tiny_model)
    after = tokenizer.encode(" salt")
    kernel = presets.load("default").settings["kernel_size"]
    method = fk.SnapKV(**settings, kernel_size=kernel)
    read = fk.prefill(model, [tokenizer.encode(CONTEXT)], method=method, max_new_tokens=0)
    assert (np.asarray(read.cache.layer(0).positions) >= 0).sum(-1).tolist() == [[20, 20]]
    expected = log_softmax(read)[after[0]]
    for i in range(1, len(after)):
        options = {"method": fk.FullKV(), "max_new_tokens": 0, "cache": read.cache}
        expected += log_softmax(fk.prefill(model, [after[:i]], **options))[after[i]]
    assert likelihood == pytest.approx(expected, rel=1e-4)
    [(whole, _)] = likelihoods(FastKVModel(str(tiny_model), method="full"), (CONTEXT, " salt"))
    assert abs(likelihood - whole) > 0.01 * abs(whole)


def test_continuations_without_tokens_of_their_own_have_finite_likelihoods(smollm2_path):
    """Where both meet inside a token, that token belongs to the continuation; that nothing follows is certain."""
    model = FastKVModel(str(smollm2_path), method="full")
    pairs = [("hello wor", "ld"), ("Yes", ""), ("", ""), ("", "Yes"), ("hello", " world"), ("Yes ", "")]
    met, nothing, _, first, whole, space = likelihoods(model, *pairs)
    assert met == whole and nothing == space == (0.0, True)
    assert np.isfinite([met[0], first[0]]).all() and met[0] < 0


def answers(model: FastKVModel, *arguments: dict) -> list[str]:
    return model.generate_until([SimpleNamespace(args=(CONTEXT, given)) for given in arguments], disable_tqdm=True)


def test_answers_are_decoded_as_the_request_says(tiny_model):
    model = FastKVModel(str(tiny_model), method="full", batch_size=2)
    hot = {"temperature": 50.0, "max_tokens": 6, "until": [""]}
    one, other, greedy, again = answers(
        model, hot, hot, {"max_new_tokens": 6, "until": None}, {**hot, "do_sample": False}
    )
    assert one != other and greedy == again
    assert answers(model, hot, hot) == answers(model, hot, hot)
    with pytest.raises(fk.FastKVConfigError, match="mixes the special token"):
        answers(model, {"until": ["so<|end|>"]})


def test_an_empty_context_begins_with_the_token_that_begins_a_text(tiny_model):
    """Or else ends one, as likelihoods have it."""
    model = FastKVModel(str(tiny_model), method="full", batch_size=2)
    asked = [("", {"max_gen_toks": 4}), (CONTEXT, {"max_gen_toks": 4}), ("<|end|>", {"max_gen_toks": 4})]
    empty, _, written = model.generate_until([SimpleNamespace(args=args) for args in asked], disable_tqdm=True)
    assert empty == written


def test_the_template_is_told_what_model_args_say(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    template = (folder / "chat_template.jinja").read_text() + "{% if enable_thinking is defined %}"
    template += "{{ enable_thinking }} {{ strftime_now('%Y') }} {{ style }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "hi"}]
    plain = FastKVModel.create_from_arg_string(f"model={folder}").apply_chat_template(chat)
    words = f"model={folder},enable_thinking=False,date=2024-02-29"
    assert FastKVModel.create_from_arg_string(words).apply_chat_template(chat) == plain + "False 2024 "
    given = {"enable_thinking": True, "style": "terse"}
    for arguments in (given, json.dumps(given)):
        words = {"model": str(folder), "chat_template_args": arguments, "date": "2024-02-29"}
        assert FastKVModel.create_from_arg_obj(words).apply_chat_template(chat) == plain + "True 2024 terse"
    with pytest.raises(fk.FastKVConfigError, match="must be a JSON object"):
        FastKVModel.create_from_arg_string(f"model={folder},chat_template_args=[]")


def test_the_likelihood_of_a_whole_text_is_refused(tiny_model):
    with pytest.raises(fk.FastKVConfigError, match="a whole text has no prompt to compress; use tasks with a context"):
        FastKVModel(str(tiny_model)).loglikelihood_rolling([SimpleNamespace(args=(CONTEXT,))])


# ------------------------------------------------------------------------------------------ beside evaluate.py

SNAPKV = {"capacity": 64, "window_size": 8, "min_prompt_to_compress": 0}
STORIES = {
    "Who keeps the lamp?": ("The baker of the harbour keeps the lamp.", "the baker of the harbour"),
    "What colour is the boat?": ("The boat of the fisherman is painted green.", "green"),
    "Where is the key?": ("The key of the lighthouse lies under a stone.", "under a stone"),
}
TASK = """
task: our_hotpotqa
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/hotpotqa.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: !function scoring.prompt
doc_to_target: "{{{{answers[0]}}}}"
process_results: !function scoring.f1
generation_kwargs: {{until: [], max_gen_toks: 32, do_sample: false}}
metric_list: [{{metric: f1, aggregation: mean, higher_is_better: true}}]
"""
SCORING = """
from fastkv_jax.evals.suites import longbench, scorers

HOTPOTQA = longbench.TASKS["hotpotqa"]


def prompt(doc):
    return "".join(HOTPOTQA.prompt(doc["context"], doc["input"]))


def f1(doc, results):
    return {"f1": scorers.score(HOTPOTQA.metric, results[0], doc["answers"]).score}
"""


def test_longbench_in_the_harness_scores_what_evaluate_scores(tmp_path, smollm2_path):
    rows = [
        {"input": question, "context": f"{CONTEXT} {fact} {CONTEXT}", "answers": [answer], "length": 9,
         "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": str(i)}
        for i, (question, (fact, answer)) in enumerate(STORIES.items())
    ]  # fmt: skip
    (tmp_path / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scoring.py").write_text(SCORING)
    (tmp_path / "our_hotpotqa.yaml").write_text(TASK.format(folder=tmp_path))

    words = [f"--{name.replace('_', '-')}={value}" for name, value in SNAPKV.items()]
    flags = ["--suite", "longbench", "--tasks", "hotpotqa", "--data", str(tmp_path), "--method", "snapkv", *words]
    flags += ["--model", str(smollm2_path), "--platform", "cpu", "--no-compile-cache", "--quiet"]
    assert evaluate.main([*flags, "--output", str(tmp_path / "out")]) == 0
    records = merged(tmp_path / "out" / "snapkv")

    model = FastKVModel(str(smollm2_path), method="snapkv", batch_size=8, **SNAPKV)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model, tasks=["our_hotpotqa"], task_manager=tasks, apply_chat_template=True)
    assert found is not None
    samples = sorted(found["samples"]["our_hotpotqa"], key=lambda sample: sample["doc_id"])
    for sample, asked, record in zip(samples, longbench.read(tmp_path, "hotpotqa"), records, strict=True):
        context, asked_for = sample["arguments"][0]
        theirs = model._prompt(0, context, gen_kwargs.read(asked_for, 256))
        ours = prompts.encode(fk.load_tokenizer(smollm2_path), asked, 8192 - 32, UPSTREAM)
        assert (theirs.tokens, theirs.window_end) == (ours.tokens, ours.window_end)
        assert sample["resps"][0][0] == record["prediction"] and sample["f1"] == record["score"]
    scores = [record["score"] for record in records]
    assert found["results"]["our_hotpotqa"]["f1,none"] == pytest.approx(np.mean(scores)) and 0 < np.mean(scores) < 1
