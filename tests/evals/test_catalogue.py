"""Suites by their settings."""

import json

import pytest

import fastkv_jax as fk
from fastkv_jax.evals.catalogue import SuiteSettings, build, check

COUNT = lambda words: len(words.split())  # noqa: E731 - a tokenizer of words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "rulers"}, "suite must be one of ruler, longbench, needle, perplexity, got 'rulers'"),
        ({"suite": "ruler"}, "suite ruler needs lengths, in tokens"),
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
    assert "triviaqa" in suite.groups["few_shot"]


def test_a_text_is_read_to_three_quarters():
    suite = build(SuiteSettings("perplexity", lengths=(400,), samples=2), COUNT, 0)
    for sample in suite.samples:
        read, rest = COUNT(sample.context), COUNT(sample.answers[0])
        assert 350 <= read + rest <= 400 and abs(read - 3 * rest) <= 4 and sample.max_new_tokens == 0
        assert suite.score(sample, {"prediction": "", "nll": 1.0}) is None
    assert suite.samples == build(SuiteSettings("perplexity", lengths=(400,), samples=2), COUNT, 0).samples
