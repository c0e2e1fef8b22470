"""Scores are those of the published formulas, each written once more here in another way."""

import difflib
import random
import re
import string
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge import Rouge

from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.evals.suites import scorers
from fastkv_jax.evals.suites.scorers import METRICS, Scored, score

WORDS = (
    "the a an The lamp lamps of 12 7 12th Paragraph keeper's sea, sea. (harbour) Ärger x_y \n\n anchor.. theory".split(
        " "
    )
)
TEXTS = 600


def texts(seed: int, most: int = 25) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, most))) for _ in range(TEXTS)]


PAIRS = list(zip(texts(1), texts(2), strict=True))


# ---------------------------------------------------------------------------------------------------------- RULER


def test_contains_looks_for_the_answer_in_any_case():
    rng = random.Random(3)
    hits = 0
    for text, other in PAIRS:
        answer = rng.choice(((other.split() or ["x"])[0], "LAMP", "the lamp", "12 \n"))
        cleaned = "".join("\n" if ord(c) < 32 else c for c in text.strip()).strip()
        expected = 1.0 if cleaned.lower().find(answer.lower()) >= 0 else 0.0
        assert scorers.contains(text, answer) == expected
        hits += int(expected)
    assert 100 < hits < 500


def test_control_characters_are_line_breaks():
    assert scorers.contains("\x00a\x07b\x1f", "a\nb") == 1
    assert scorers.contains("a\x07b", "a\x07b") == 0
    assert scorers.contains("a\x7fb", "a\x7fb") == 1


def test_all_is_the_share_of_the_answers_and_part_whether_there_is_one():
    assert score("all", "1 and 3", ["1", "2", "3", "4"]) == Scored(0.5)
    assert score("part", "1 and 3", ["2", "3"]) == Scored(1.0)
    assert score("part", "1 and 3", ["2", "4"]) == Scored(0.0)


# ------------------------------------------------------------------------------------------------------- LongBench


def f1_oracle(prediction: str, answer: str) -> float:
    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        for article in ("a", "an", "the"):
            kept = re.sub(rf"(?<!\w){article}(?!\w)", " ", kept)
        return kept.split()

    said, right = words(prediction), words(answer)
    left, common = list(right), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(right)
    return 2 * precision * recall / (precision + recall)


def test_f1():
    for prediction, answer in PAIRS:
        assert scorers.f1(prediction, answer) == pytest.approx(f1_oracle(prediction, answer), abs=1e-12)


def test_f1_examples():
    assert scorers.f1("The lamp.", "a LAMP") == 1
    assert scorers.f1("lamp lamp", "lamp") == pytest.approx(2 / 3)
    assert scorers.f1("the", "the") == scorers.f1("", "lamp") == 0  # articles do not count


def sentences(text: str) -> list[list[str]]:
    """A sentence of spaces alone is one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def common_subsequence(x: list[str], y: list[str]) -> list[str]:
    """The longest; of several, that which leaves out words of y first."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, one in enumerate(x, 1):
        for j, other in enumerate(y, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
    i, j, found = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            found.append(x[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_f(common: int, said: int, right: int) -> float:
    precision, recall = common / said, common / right
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_oracle(prediction: str, answer: str) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L: both count distinct words."""
    said, right = sentences(prediction), sentences(answer)
    if not said or not right:
        return 0.0, 0.0
    words = [{word for sentence in text for word in sentence} for text in (said, right)]
    in_both = {word for one in right for other in said for word in common_subsequence(one, other)}
    sizes = len(words[0]), len(words[1])
    return rouge_f(len(words[0] & words[1]), *sizes), rouge_f(len(in_both), *sizes)


def package(prediction: str, answer: str) -> tuple[float, float]:
    try:
        scores: Any = Rouge().get_scores([prediction], [answer], avg=True)
    except ValueError:
        return 0.0, 0.0
    return scores["rouge-1"]["f"], scores["rouge-l"]["f"]


def test_rouge_is_the_package_s_and_that_is_what_the_oracle_says():
    differ = 0
    for prediction, answer in PAIRS:
        ours = tuple(score(metric, prediction, [answer]).score for metric in ("rouge_1", "rouge_l"))
        assert ours == package(prediction, answer) == pytest.approx(rouge_oracle(prediction, answer), abs=1e-12)
        differ += ours[0] != ours[1]
    assert differ > 100


@pytest.mark.parametrize("prediction", ["", ".", "..."])
def test_an_answer_without_words_has_rouge_0_and_is_no_problem(prediction: str):
    assert score("rouge_l", prediction, ["lamp"]) == Scored(0.0)


def test_a_reference_without_words_is_a_problem():
    assert score("rouge_l", "lamp", ["."]) == Scored(0.0, "rouge: the reference holds no words")
    assert score("rouge_l", "lamp", [".", "lamp"]).score == pytest.approx(1)


def test_rouge_of_a_sentence_deeper_than_python_s_recursion_limit():
    before = sys.getrecursionlimit()
    words = " ".join(f"w{i}" for i in range(1500))
    found = score("rouge_l", words, ["x w7 y"])
    assert found.score == pytest.approx(rouge_f(1, 1500, 3)) and not found.problem
    assert sys.getrecursionlimit() == before


def test_rouge_of_a_sentence_too_long_for_any_limit_is_told(monkeypatch):
    monkeypatch.setattr(scorers, "RECURSION_LIMIT", 0)
    words = " ".join(f"w{i}" for i in range(3000))
    assert score("rouge_l", words, ["x y"]) == Scored(0.0, "rouge: a sentence is too long (RecursionError)")


def test_without_the_package_rouge_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    scorers._rouge_package.cache_clear()
    with pytest.raises(FastKVConfigError, match=r"pip install 'fastkv-jax\[evaluate\]'"):
        score("rouge_l", "lamp", ["lamp"])


CLASSES = [
    "Other",
    "Other number",
    "number",
    "Number of someone",
    "Person",
    "Individual",
    "Other entity",
    "entity",
    "x",
]


def classification_oracle(prediction: str, answer: str, classes: list[str]) -> float:
    named = []
    for name in classes:
        if prediction.count(name):
            named += [name]
    for name in named:  # the list changes under the loop, as in the original
        if answer.count(name) and not name == answer:
            named.remove(name)
    return {True: 1.0, False: 0.0}[answer in named] / max(len(named), 1)


def test_classification():
    rng = random.Random(5)
    seen = set()
    for _ in range(TEXTS):
        prediction = rng.choice(("Type: ", "", "x")) + " ".join(rng.sample(CLASSES, rng.randint(0, 4)))
        classes, answer = rng.sample(CLASSES, rng.randint(1, 9)), rng.choice(CLASSES)
        found = score("classification", prediction, [answer], classes=classes).score
        assert found == classification_oracle(prediction, answer, classes)
        seen.add(found)
    assert len(seen) > 3


def test_classification_passes_over_the_class_behind_one_it_takes_out():
    assert scorers.classification("Other number", "Other number", ["Other", "number", "Other number"]) == 1 / 2
    assert scorers.classification("Other number", "Other number", ["Other", "Other number", "number"]) == 1
    assert scorers.classification("nothing", "Other number", ["Other", "Other number"]) == 0


def numbers_of(text: str) -> list[str]:
    return "".join(c if c.isdecimal() else " " for c in text).split()


def test_count_and_retrieval():
    rng = random.Random(6)
    for text, _ in PAIRS:
        answer = rng.choice(("12", "7", "3"))
        numbers = numbers_of(text)
        expected = sum(number == answer for number in numbers) / len(numbers) if numbers else 0.0
        assert scorers.count(text, answer) == expected
        assert scorers.retrieval(text, f"Paragraph {answer}") == expected


def test_a_retrieval_s_answer_of_another_form_is_a_problem():
    assert score("retrieval", "Paragraph 3", ["3"]).problem == "retrieval: an answer must hold 'Paragraph N', got '3'"


CODE = [
    "",
    "    return x",
    "# a comment",
    "x = y // 2",
    "```python",
    "for i in range(10):",
    "def f(self, x):",
    "\t}",
    "é=1",
]


def code_oracle(prediction: str, answer: str) -> float:
    while prediction.startswith("\n"):
        prediction = prediction[1:]
    kept = [line for line in prediction.split("\n") if not re.search(r"[`#]|//", line)]
    ratio = difflib.SequenceMatcher(a=kept[0] if kept else "", b=answer).ratio()
    return int(round(ratio * 100)) / 100


def test_code():
    rng = random.Random(7)
    seen = set()
    for _ in range(TEXTS):
        prediction = "\n".join(rng.choices(CODE, k=rng.randint(0, 4)))
        answer = rng.choice(CODE) + rng.choice(("", " ", ";", "  # why"))
        found = scorers.code(prediction, answer)
        assert found == code_oracle(prediction, answer)
        seen.add(found)
    assert len(seen) > 30


def test_code_compares_the_first_line_that_is_no_comment_even_an_empty_one():
    assert scorers.code("\n\n# why\nx = 1\ny", "x = 1") == 1
    assert scorers.code("# why\n\nx = 1", "x = 1") == 0
    assert scorers.code("x // 2", "x // 2") == 0
    assert scorers.code("# only", "") == 1


# ------------------------------------------------------------------------------------------------------ needle test


def test_words_found():
    for prediction, answer in PAIRS:
        expected = {word.lower() for word in answer.split()}
        if not expected:
            assert score("words", prediction, [answer]) == Scored(0.0, "words: the answer holds no words")
            continue
        found = [word for word in expected if word in {w.lower() for w in prediction.split()}]
        assert scorers.words_found(prediction, answer) == len(found) / len(expected)


# ----------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"all"}))
def test_the_best_answer_counts(metric: str):
    answers = ["4", "3"] if metric == "count" else ["Paragraph 4", "Paragraph 3"]
    alone = [score(metric, "Paragraph 3", [answer], classes=answers).score for answer in answers]
    assert score(metric, "Paragraph 3", answers, classes=answers).score == max(alone) > min(alone)


@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=3), st.sampled_from(sorted(METRICS)))
def test_a_score_lies_between_0_and_1_whatever_is_said(prediction: str, answers: list[str], metric: str):
    for first_line in (False, True):
        found = score(metric, prediction, answers, classes=answers, first_line=first_line)
        assert 0 <= found.score <= 1


def test_only_the_first_line_counts_if_it_is_said_so():
    assert score("f1", "\n\nno\nlamp", ["lamp"], first_line=True) == Scored(0.0)
    assert score("f1", "\n\nlamp\nno", ["lamp"], first_line=True) == Scored(1.0)


def test_unknown_metrics_and_no_answers_are_errors():
    with pytest.raises(InputError, match="metric must be one of all, part, f1, .* got 'bleu'"):
        score("bleu", "", ["x"])
    with pytest.raises(InputError, match="f1 needs an answer to compare with; there is none"):
        score("f1", "", [])
