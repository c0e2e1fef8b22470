"""lm-evaluation-harness's own command line with a model of ours: local tasks, no network, no PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = harness(tiny_model, tasks, "--include_path", str(tasks), "--tasks", "says", "--gen_kwargs", "do_sample=true")
    assert done.returncode == 2 and "fastkv_jax decodes greedily" in done.stderr.splitlines()[-1]
