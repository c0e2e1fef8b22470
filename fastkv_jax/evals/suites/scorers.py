"""How far an answer is right, 0 to 1, by the formulas of RULER, LongBench and the needle test.

`score` is what suites use. The other functions compare one answer with one reference and are pure. Libraries matter:
ROUGE is that of the package `rouge`, not `rouge-score`, and code is compared by `difflib`; with others, scores of the
same answers are off by up to 8 points.
"""

import difflib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from fastkv_jax.errors import FastKVConfigError, InputError

RECURSION_LIMIT = 20_000  # `rouge` recurses once a word: for two sentences of 10,000 words together
_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scored(NamedTuple):
    """A score from 0 to 1, and why an answer that could not be compared counts as 0."""

    score: float
    problem: str = ""


class Unscorable(ValueError):
    """An answer that a metric cannot compare with this reference."""


def score(
    metric: str, prediction: str, answers: Sequence[str], *, classes: Sequence[str] = (), first_line: bool = False
) -> Scored:
    """The score of one sample: the mean over the answers for `all`, the best of them for every other metric.

    `classes` are what a classification chooses from; with `first_line`, the rest of the prediction does not count.
    Raises `InputError` for an unknown metric or if there is no answer to compare with.
    """
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not answers:
        raise InputError(f"{metric} needs an answer to compare with; there is none")
    if first_line:
        prediction = first_line_of(prediction)
    scores, problems = [], []
    for answer in answers:
        try:
            scores.append(METRICS[metric](prediction, answer, classes))
        except Unscorable as problem:
            scores.append(0.0)
            problems.append(str(problem))
    return Scored(sum(scores) / len(scores) if metric == "all" else max(scores), "; ".join(problems))


def first_line_of(prediction: str) -> str:
    """The first line that is not empty."""
    return prediction.lstrip("\n").partition("\n")[0]


# ---------------------------------------------------------------------------------------------------------- RULER


def contains(prediction: str, answer: str) -> float:
    """1 if the prediction holds the answer in any case; its control characters count as line breaks (RULER)."""
    return float(answer.lower() in _CONTROL.sub("\n", prediction.strip()).strip().lower())


# ------------------------------------------------------------------------------------------------------- LongBench


def f1(prediction: str, answer: str) -> float:
    """F1 over words, without case, punctuation and English articles; how often a word stands counts (LongBench)."""
    said, right = (_words(text) for text in (prediction, answer))
    common = (said & right).total()
    return 2 * common / (said.total() + right.total()) if common else 0.0


def _words(text: str) -> Counter[str]:
    return Counter(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def rouge_l(prediction: str, answer: str) -> float:
    """F of the summary-level ROUGE-L of the package `rouge` (LongBench); see `rouge_1` for errors."""
    return _rouge("rouge-l", prediction, answer)


def rouge_1(prediction: str, answer: str) -> float:
    """F of ROUGE-1 of the package `rouge`: over distinct words, without stemming.

    0 for an empty prediction. Raises `Unscorable` for an empty reference, or one sentence too long for the package, and
    `FastKVConfigError` if the package is missing.
    """
    return _rouge("rouge-1", prediction, answer)


def _rouge(metric: str, prediction: str, answer: str) -> float:
    if not answer.replace(".", ""):
        raise Unscorable("rouge: the reference holds no words")
    if not prediction.replace(".", ""):
        return 0.0
    rouge = _rouge_package().Rouge(metrics=[metric], stats=["f"])
    try:
        with _deep_recursion():
            return float(rouge.get_scores([prediction], [answer], avg=True)[metric]["f"])
    except RecursionError as error:
        raise Unscorable("rouge: a sentence is too long (RecursionError)") from error


@cache
def _rouge_package() -> Any:
    try:
        import rouge
    except ImportError as error:
        raise FastKVConfigError("ROUGE scores need the package rouge: pip install 'fastkv-jax[evaluate]'") from error
    return rouge


@contextmanager
def _deep_recursion() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, RECURSION_LIMIT))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of the classes that the prediction names, if the right one is among them (LongBench).

    A class whose name is a part of the right one's does not count. As in the original, the class after one that was
    taken out is not looked at: with "Other", "Other number", "number" and the answer "Other number", "number" stays.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        name = named[place]
        if name in answer and name != answer:
            named.remove(name)
        place += 1
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """The share of the prediction's numbers that are the right one (LongBench's passage_count)."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """The share of the prediction's numbers that are the N of the answer "Paragraph N" (LongBench).

    Raises `Unscorable` if the answer is of another form.
    """
    found = re.search(r"Paragraph (\d+)", answer)
    if found is None:
        raise Unscorable(f"retrieval: an answer must hold 'Paragraph N', got {answer!r}")
    return count(prediction, found[1])


def code(prediction: str, answer: str) -> float:
    """How alike the first line that holds no `, # or // and the answer are: a whole per cent (LongBench).

    The rule is the original's, so an empty line may be the one. The ratio is what fuzzywuzzy gives where
    python-Levenshtein is not installed, as with LongBench's and FastKV's requirements.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


# ------------------------------------------------------------------------------------------------------ needle test


def words_found(prediction: str, answer: str) -> float:
    """The share of the answer's distinct words that stand in the prediction (the needle test's picture).

    Words are what stands between spaces, punctuation included. The reference's other score, ROUGE-1 F times 10 of the
    package rouge-score with stemming, is not offered: `rouge_1` is near it, and lower where only the stems agree.
    Raises `Unscorable` if the answer holds no words.
    """
    expected = set(answer.lower().split())
    if not expected:
        raise Unscorable("words: the answer holds no words")
    return len(expected & set(prediction.lower().split())) / len(expected)


# --------------------------------------------------------------------------------------------------------- registry


def _plain(compare: Callable[[str, str], float]) -> Callable[[str, str, Sequence[str]], float]:
    return lambda prediction, answer, classes: compare(prediction, answer)


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "all": _plain(contains),
    "part": _plain(contains),
    "f1": _plain(f1),
    "rouge_l": _plain(rouge_l),
    "classification": classification,
    "count": _plain(count),
    "retrieval": _plain(retrieval),
    "code": _plain(code),
    "words": _plain(words_found),
    "rouge_1": _plain(rouge_1),
}  # (prediction, answer, classes) -> 0 to 1
