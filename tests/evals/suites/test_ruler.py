"""RULER's rows, as NVIDIA and as FastKV write them, become the same samples."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fastkv_jax.errors import InputError
from fastkv_jax.evals.suites import grids, ruler
from fastkv_jax.evals.suites.ruler import PAPER, TASKS

NIAH = (
    "A special magic number is hidden within the following text.\n"
    "One of the special magic numbers for tall-owl is: 1234567."
)
ROWS: dict[str, tuple[str, str, str]] = {  # context, question, answer prefix
    "niah_single_1": (
        NIAH,
        "\nWhat is the special magic number for tall-owl mentioned in the provided text?",
        " The special magic number for tall-owl mentioned in the provided text is",
    ),
    "niah_multiquery": (
        "Some special magic numbers are hidden within the following text.\nx",
        "\nWhat are all the special magic numbers for a, and b mentioned in the provided text?",
        " The special magic numbers for a, and b mentioned in the provided text are",
    ),
    "vt": (
        "VAR A = 1\nQuestion: Find all variables that are assigned the value 12345 in the text above. Answer: "
        "According to the chain(s) of variable assignment in the text above, 5 ...\n\nMemorize and track",
        "\nQuestion: Find all variables that are assigned the value 77777 in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        "value 77777, they are: ",
    ),
    "cwe": (
        "Below is a numbered list of words. 1. a",
        "\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": (
        "Read the following coded text ... abc ...",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa_1": (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\nDocument 1:\nx",
        "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other "
        "words."
        "\n\nQuestion: Who?",
        " Answer:",
    ),
}


def row(name: str, **more: Any) -> dict[str, Any]:
    context, question, prefix = ROWS[name]
    outputs = ["1234567"]
    return {"index": 5, "input": context + question, "outputs": outputs, "length": 99, "answer_prefix": prefix, **more}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows))
    return path


# ----------------------------------------------------------------------------------------------------------- tasks


def test_templates_are_the_original_s_byte_for_byte():
    kinds = grids.load("ruler")["kinds"].values()
    parts = [[kind["template"], kind["answer_prefix"], kind["max_new_tokens"]] for kind in kinds]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()  # of data/synthetic/constants.py at c3f5e3b
    assert digest == "78628043af46aefa388a337dcf12fd748f41d13799f91a2dbf8de08754ef2423"


def test_thirteen_tasks_of_which_eleven_are_the_paper_s():
    assert len(TASKS) == 13
    assert set(TASKS) - set(PAPER) == {"qa_1", "qa_2"}
    budgets = {task.kind: task.max_new_tokens for task in TASKS.values()}
    assert budgets == {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert {name for name, task in TASKS.items() if task.metric != "all"} == {"qa_1", "qa_2"}
    assert all(task.metric == "part" for name, task in TASKS.items() if name.startswith("qa"))


def test_one_needle_is_spoken_of_in_the_singular():
    before, after, prefix = TASKS["niah_single_3"].parts(type_needle_v="uuid", query="k")
    assert before.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will"
    )
    assert after == "\nWhat is the special magic uuid for k mentioned in the provided text?"
    assert prefix == " The special magic uuid for k mentioned in the provided text is"
    assert TASKS["niah_multivalue"].template.startswith("Some special magic {type_needle_v} are hidden")


# --------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ROWS)
def test_rows_with_and_without_answer_prefix_are_the_same_sample(name: str, tmp_path):
    context, question, prefix = ROWS[name]
    fastkv = {"index": 0, "input": context + question + prefix, "outputs": ["1234567"], "length": 99}
    samples = ruler.read(write(tmp_path / "x.jsonl", row(name), fastkv), name, "4096")
    for i, sample in enumerate(samples):
        assert (sample.context, sample.question, sample.prefill) == (context, question, prefix)
        assert (sample.task, sample.id, sample.group, sample.chat) == (name, str(i), "4096", True)
        assert sample.max_new_tokens == TASKS[name].max_new_tokens
    assert TASKS[name].score(samples[0], "it is 1234567.").score == 1
    assert ruler.from_rows([row(name)], name, "4096") == samples[:1]


def test_newlines_may_have_been_taken_out(tmp_path):
    context, question, _ = ROWS["niah_single_1"]
    flat = (context + question).replace("\n", " ")
    (sample,) = ruler.from_rows([row("niah_single_1", input=flat)], "niah_single_1")
    assert sample.context + sample.question == flat and sample.question.startswith(" What is the special")


def test_ids_do_not_follow_index_which_may_repeat():
    assert [s.id for s in ruler.from_rows([row("vt"), row("vt")], "vt")] == ["0", "1"]


def test_files_are_found_where_nvidia_and_fastkv_put_them(tmp_path):
    assert ruler.find(tmp_path, "vt") == tmp_path / "vt.jsonl"
    (tmp_path / "vt").mkdir()
    write(tmp_path / "vt" / "validation.jsonl", row("vt"))
    assert ruler.find(tmp_path, "vt") == tmp_path / "vt" / "validation.jsonl"
    write(tmp_path / "vt.jsonl", row("vt"))
    assert ruler.find(tmp_path, "vt") == tmp_path / "vt.jsonl"


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"index": "x"}, "field 'index' must be a whole number, got \"x\""),
        ({"input": 3}, "field 'input' must be text, got 3"),
        ({"outputs": []}, r"field 'outputs' must be a list of texts, not empty, got \[\]"),
        ({"answer_prefix": 3}, "field 'answer_prefix' must be text, got 3"),
        ({"answer_prefix": None}, r"field 'input' must end with ' The speci'\.\.\. of niah_single_1"),
        ({"input": "Hello?"}, "field 'input' must hold 'What is the special magic', as niah_single_1 asks"),
        ({"input": "[INST] " + NIAH}, "holds a chat template; generate with --model_template_type base"),
        ({"input": "<|start_header_id|>" + NIAH}, "holds a chat template; generate with --model_template_type base"),
    ],
)
def test_a_wrong_row_is_named(more: dict[str, Any], message: str, tmp_path):
    path = write(tmp_path / "x.jsonl", row("niah_single_1"), row("niah_single_1", **more))
    with pytest.raises(InputError, match=rf"x\.jsonl, line 2: {message}" if "chat" not in message else message):
        ruler.read(path, "niah_single_1")


@pytest.mark.parametrize("field", ["index", "input", "outputs"])
def test_a_missing_field_is_named(field: str, tmp_path):
    incomplete = row("vt")
    del incomplete[field]
    with pytest.raises(InputError, match=rf"x\.jsonl, line 1: there is no field '{field}'"):
        ruler.read(write(tmp_path / "x.jsonl", incomplete), "vt")


def test_torn_and_empty_files_are_named(tmp_path):
    with pytest.raises(InputError, match="line 2: not whole JSON"):
        ruler.read(write(tmp_path / "x.jsonl", row("vt"), '{"index": 1, "inp'), "vt")
    with pytest.raises(InputError, match="the file holds no samples"):
        ruler.read(write(tmp_path / "x.jsonl"), "vt")


def test_an_unknown_task_is_an_error(tmp_path):
    for call in (ruler.find, ruler.read):
        with pytest.raises(InputError, match="RULER task must be one of niah_single_1, .*, got 'qa_3'"):
            call(write(tmp_path / "x.jsonl", row("vt")), "qa_3")
