"""LongBench's samples are its rows in its own words; damaged files are named by line and field."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv_jax.errors import InputError
from fastkv_jax.evals import protocols
from fastkv_jax.evals.protocols import FASTKV, PROTOCOLS, UPSTREAM
from fastkv_jax.evals.suites import longbench
from fastkv_jax.evals.suites.longbench import GROUPS, TASKS

ROW: dict[str, Any] = {
    "input": "Who keeps the {context} lamp? {input}",
    "context": "The {input} baker\u2028 keeps it.\r\n{0}",
    "answers": ["the baker", "Baker"],
    "length": 4321,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "a1",
}


def write(folder: Path, *rows: object, task: str = "qasper") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{task}.jsonl").write_bytes("\n".join(lines).encode())
    return folder


# ----------------------------------------------------------------------------------------------------------- tasks


def test_templates_are_the_original_s_byte_for_byte():
    templates = {name: TASKS[name].template for name in sorted(TASKS)}
    digest = hashlib.sha256(json.dumps(templates).encode()).hexdigest()  # of dataset2prompt.json at 2e00731f
    assert digest == "75e339f4f58566663b9e2916d85ca7258191b614158272128161675baece6c42"


def test_the_tasks_are_those_of_the_paper():
    assert len(TASKS) == 16 and sorted(task for tasks in GROUPS.values() for task in tasks) == sorted(TASKS)
    assert [len(tasks) for tasks in GROUPS.values()] == [3, 3, 3, 3, 2, 2]
    continued = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert {name for name, task in TASKS.items() if not task.chat} == continued
    assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum"}
    metrics = {task.metric for task in TASKS.values()}
    assert metrics == {"f1", "rouge_l", "classification", "count", "retrieval", "code"}
    budgets = {32: 6, 64: 4, 128: 3, 512: 3}
    assert {n: sum(task.max_new_tokens == n for task in TASKS.values()) for n in budgets} == budgets


@pytest.mark.parametrize("name", TASKS)
def test_context_and_question_join_to_the_original_s_prompt(name: str, tmp_path):
    row = {**ROW, "all_classes": ["one", "two"]}
    (sample,) = longbench.read(write(tmp_path, row, task=name), name)
    assert sample.context + sample.question == TASKS[name].template.format(**row)
    assert sample.context.endswith(row["context"])
    task = TASKS[name]
    assert (sample.chat, sample.max_new_tokens, sample.prefill) == (task.chat, task.max_new_tokens, "")


def test_samples_hold_what_is_scored(tmp_path):
    folder = write(tmp_path, {**ROW, "all_classes": ["x", "y"], "_id": 7}, "", ROW, task="trec")
    with pytest.raises(InputError, match="line 3: field 'all_classes' must name the classes of trec"):
        longbench.read(folder, "trec")
    first, second = longbench.read(write(tmp_path, {**ROW, "all_classes": ["x"], "_id": 7}, ROW), "qasper")
    assert (first.id, second.id, first.classes, second.classes) == ("7", "a1", ("x",), ())
    assert first.answers == ("the baker", "Baker") and first.group == ""
    assert TASKS["qasper"].score(second, "A baker!").score == 1


def test_the_first_line_counts_where_the_original_cuts(tmp_path):
    (sample,) = longbench.read(write(tmp_path, ROW, task="triviaqa"), "triviaqa")
    assert TASKS["triviaqa"].score(sample, "\nbaker\nPassage: the baker").score == 1
    assert TASKS["qasper"].score(sample, "\nbaker\nPassage: the baker").score < 1


def test_a_sample_that_stands_twice_has_two_ids(tmp_path):
    assert [s.id for s in longbench.read(write(tmp_path, ROW, ROW), "qasper")] == ["a1", "a1#2"]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("field", ROW)
def test_a_missing_field_is_named(field: str, tmp_path):
    row = {name: value for name, value in ROW.items() if name != field}
    with pytest.raises(InputError, match=rf"qasper\.jsonl, line 2: there is no field '{field}'$"):
        longbench.read(write(tmp_path, ROW, row), "qasper")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input", None, "'input' must be text, got null"),
        ("context", ["x"], r"'context' must be text, got \[\"x\"\]"),
        ("answers", [], r"'answers' must be a list of texts, not empty, got \[\]"),
        ("answers", ["x", 1], "'answers' must be a list of texts, not empty, got"),
        ("answers", "baker", "'answers' must be a list of texts, not empty, got \"baker\""),
        ("length", "many", "'length' must be a whole number, got \"many\""),
        ("length", True, "'length' must be a whole number, got true"),
        ("all_classes", "x", "'all_classes' must be null or a list of texts, got"),
        ("_id", None, "'_id' must be text or a whole number, got null"),
        ("input", ["x" * 100], r"'input' must be text, got \[\"x{55}\.\.\.$"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, message: str, tmp_path):
    with pytest.raises(InputError, match=rf"qasper\.jsonl, line 1: field {message}"):
        longbench.read(write(tmp_path, {**ROW, field: value}), "qasper")


def test_a_torn_line_is_named(tmp_path):
    torn = json.dumps(ROW)[:50]
    with pytest.raises(InputError, match=r"qasper\.jsonl, line 2: not whole JSON \(.* at column \d+\)"):
        longbench.read(write(tmp_path, ROW, torn), "qasper")
    with pytest.raises(InputError, match="line 1: not whole JSON"):
        longbench.read(write(tmp_path, torn + json.dumps(ROW)), "qasper")  # appended to after a cut
    with pytest.raises(InputError, match="line 1: not whole JSON .*recursion"):
        longbench.read(write(tmp_path, "[" * 100_000), "qasper")
    with pytest.raises(InputError, match="line 1: must be a JSON object, got list"):
        longbench.read(write(tmp_path, "[1]"), "qasper")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_named(content: bytes, tmp_path):
    (tmp_path / "qasper.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"qasper\.jsonl: the file holds no samples"):
        longbench.read(tmp_path, "qasper")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"lcc\.jsonl cannot be read: No such file or directory"):
        longbench.read(tmp_path, "lcc")
    (tmp_path / "lcc.jsonl").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"lcc\.jsonl: not UTF-8 at byte 3"):
        longbench.read(tmp_path, "lcc")


def test_a_bucket_without_its_package_names_the_extra(monkeypatch):
    def no_package(*_, **__):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("etils.epath.gpath._GPath.read_text", no_package)
    with pytest.raises(
        InputError, match=r"gs://bucket/lcc\.jsonl needs another package: pip install 'fastkv-jax\[gcs\]'"
    ):
        longbench.read("gs://bucket", "lcc")


def test_an_unknown_task_is_an_error(tmp_path):
    with pytest.raises(InputError, match="LongBench task must be one of narrativeqa, .*, got 'dureader'"):
        longbench.read(tmp_path, "dureader")


# ------------------------------------------------------------------------------------------------------- protocols


def test_upstream_and_fastkv_differ_as_measured(tmp_path):
    assert set(PROTOCOLS) == {"upstream", "fastkv"}
    assert (UPSTREAM.template, UPSTREAM.bos, UPSTREAM.end_tokens) == ("after", 1, "generation_config")
    assert (FASTKV.template, FASTKV.bos, FASTKV.end_tokens) == ("before", 2, "tokenizer")
    assert [UPSTREAM.min_new_tokens(task) for task in ("samsum", "qasper")] == [1, 0]
    assert [FASTKV.min_new_tokens(task) for task in ("samsum", "qasper")] == [1, 1]
    folder = write(write(tmp_path, ROW, task="samsum"), ROW)
    assert [longbench.read(folder, "samsum", p)[0].stop for p in (UPSTREAM, FASTKV)] == [("\n",), ()]
    assert [longbench.read(folder, "qasper", p)[0].stop for p in (UPSTREAM, FASTKV)] == [(), ()]


@given(st.lists(st.integers(), max_size=40), st.integers(2, 50))
def test_truncation_keeps_both_ends(tokens: list[int], limit: int):
    kept = protocols.truncate(tokens, limit)
    if len(tokens) <= limit:
        assert kept == tokens
    else:
        assert len(kept) == limit - limit % 2
        assert kept[: limit // 2] == tokens[: limit // 2] and kept[limit // 2 :] == tokens[len(tokens) - limit // 2 :]


def test_nothing_is_truncated_to_less_than_two_tokens():
    with pytest.raises(InputError, match="truncated to 2 tokens or more, got 1"):
        protocols.truncate([1, 2, 3], 1)
