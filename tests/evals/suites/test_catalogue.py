"""Suites by their settings."""

import json

import pytest

import fastkv_jax as fk
from fastkv_jax.evals.suites import longbench
from fastkv_jax.evals.suites.catalogue import SuiteSettings, build, check

COUNT = lambda words: len(words.split())  # noqa: E731 - a tokenizer of words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "rulers"}, "suite must be one of ruler, longbench, needle, perplexity, got 'rulers'"),
        ({"suite": "ruler"}, "suite ruler needs lengths, in tokens"),
        ({"suite": "ruler", "lengths": 900}, "lengths must be a list of int, got 900"),
        ({"suite": "ruler", "lengths": ("x",)}, r"lengths must be a list of int, got \('x',\)"),
        ({"suite": "ruler", "lengths": (900,), "samples": "x"}, r"samples must be int \| None, got 'x'"),
        ({"suite": 3}, "suite must be str, got 3"),
        ({"suite": "needle", "lengths": (900,), "seed": -1}, r"seed must be in 0 ... 2\*\*32 - 1, got -1"),
        ({"suite": "ruler", "lengths": (900,), "seed": 2**32}, "seed must be in 0 "),
        ({"suite": "needle", "lengths": (0,)}, "lengths must be >= 1, got 0"),
        ({"suite": "needle", "lengths": (900,), "samples": 3}, "suite needle has no use for samples=3"),
        ({"suite": "ruler", "lengths": (900,), "samples": 0}, "samples must be >= 1, got 0"),
        ({"suite": "ruler", "lengths": (900,), "tasks": ("vtt",)}, "suite ruler has no task 'vtt'; there are: niah_"),
        ({"suite": "longbench"}, "suite longbench needs data: a folder with its <task>.jsonl files"),
        ({"suite": "longbench", "data": "x", "protocol": "own"}, "protocol must be one of upstream, fastkv, got 'own'"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings, message):
    with pytest.raises(fk.FastKVConfigError, match=message):
        check(SuiteSettings(**settings))


def test_ruler_is_made_for_each_length_and_scored_by_its_metric():
    suite = build(SuiteSettings("ruler", ("niah_single_1", "vt"), (600, 900), samples=2), COUNT, 20)
    assert len(suite.samples) == 8 and len({(s.task, s.id) for s in suite.samples}) == 8
    assert {sample.group for sample in suite.samples} == {"600", "900"}
    sample = suite.samples[0]
    assert suite.score(sample, {"prediction": f"It is {sample.answers[0]}."}).score == 1.0
    assert suite.score(sample, {"prediction": "No idea."}).score == 0.0


def test_ruler_files_are_read_from_a_folder_for_each_length(tmp_path):
    row = {"index": 0, "input": "Some text. What is the special magic number for x mentioned in the provided text?",
           "outputs": ["7"], "length": 30, "answer_prefix": " They are"}  # fmt: skip
    (tmp_path / "512").mkdir()
    (tmp_path / "512" / "niah_single_1.jsonl").write_text(json.dumps(row) + "\n")
    suite = build(SuiteSettings("ruler", ("niah_single_1",), (512,), data=str(tmp_path)), COUNT, 0)
    assert [sample.prefill for sample in suite.samples] == [" They are"]
    with pytest.raises(fk.InputError, match="vt"):
        build(SuiteSettings("ruler", ("vt",), (512,), data=str(tmp_path)), COUNT, 0)


def test_longbench_counts_the_first_line_where_the_original_does(tmp_path):
    row = {"input": "Q?", "context": "C.", "answers": ["Paris"], "length": 9, "dataset": "triviaqa", "language": "en",
           "all_classes": None, "_id": "a"}  # fmt: skip
    (tmp_path / "triviaqa.jsonl").write_text(json.dumps(row) + "\n")
    suite = build(SuiteSettings("longbench", ("triviaqa",), data=str(tmp_path)), COUNT, 0)
    assert suite.score(suite.samples[0], {"prediction": "Paris\nQuestion: and more"}).score == 1.0


def test_longbench_has_the_paper_s_averages_if_all_tasks_are_there(tmp_path):
    row = {"input": "Q?", "context": "C.", "answers": ["x"], "length": 9, "dataset": "any", "language": "en",
           "all_classes": ["x"], "_id": "a"}  # fmt: skip
    for task in longbench.TASKS:
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    suite = build(SuiteSettings("longbench", data=str(tmp_path)), COUNT, 0)
    rows = [{"task": sample.task, "group": sample.group, "score": sample.task == "lcc"} for sample in suite.samples]
    found = {name: mean.mean for name, mean in suite.averages(rows).items()}
    assert list(found) == [*longbench.GROUPS, "LongBench", "LongBench, by task"]
    assert found["code"] == 50 and found["few_shot"] == 0
    assert (found["LongBench"], found["LongBench, by task"]) == pytest.approx((50 / 6, 100 / 16))
    assert suite.averages(rows[:4]).keys() == {"LongBench, some tasks"}


def test_ruler_and_needles_are_averaged_by_length():
    for suite in (
        SuiteSettings("ruler", ("vt", "cwe"), (900, 1200), samples=1),
        SuiteSettings("needle", (), (200, 300)),
    ):
        built = build(suite, COUNT, 0)
        rows = [{"task": s.task, "group": s.group, "score": str(suite.lengths[1]) in s.group} for s in built.samples]
        heading = {"ruler": "RULER"}.get(suite.suite, suite.suite)
        means = {name: mean.mean for name, mean in built.averages(rows).items()}
        assert means == {f"{heading} {suite.lengths[0]}": 0, f"{heading} {suite.lengths[1]}": 100}


def test_a_text_is_read_to_three_quarters():
    suite = build(SuiteSettings("perplexity", lengths=(400,), samples=2), COUNT, 0)
    for sample in suite.samples:
        read, rest = COUNT(sample.context), COUNT(sample.answers[0])
        assert 350 <= read + rest <= 400 and abs(read - 3 * rest) <= 4 and sample.max_new_tokens == 0
        assert suite.score(sample, {"prediction": "", "nll": 1.0}) is None
    assert suite.samples == build(SuiteSettings("perplexity", lengths=(400,), samples=2), COUNT, 0).samples
