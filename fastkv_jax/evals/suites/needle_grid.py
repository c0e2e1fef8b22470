"""The needle test: one sentence hidden at a depth of a text of a length, for each length and depth, and asked for."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastkv_jax.errors import InputError
from fastkv_jax.evals.sample import Sample
from fastkv_jax.evals.suites.scorers import Scored, score
from fastkv_jax.evals.texts import haystack
from fastkv_jax.evals.texts.needles import KEYS

INTRODUCTION = "Read this long text with care; a question about it follows.\n\n"


@dataclass(frozen=True)
class Needle:
    """What is hidden and asked for; the texts may hold {key} and {number}, which each cell of the grid draws anew.

    `metric` is one of `scorers.METRICS`: "all" looks for the answer as it is, "words" gives the share of its words, as
    in the needle test's usual picture, and "rouge_1" how alike answer and prediction are.
    """

    text: str = "The magic number of the {key} gate is {number}."
    question: str = "What is the magic number of the {key} gate? Answer with the number alone."
    answer: str = "{number}"
    metric: str = "all"

    def score(self, sample: Sample, prediction: str) -> Scored:
        """The sample's score, 0 to 1."""
        return score(self.metric, prediction, sample.answers)


def depths(count: int = 10) -> list[int]:
    """`count` depths from 0 to 100 per cent, evenly spread."""
    return [round(100 * i / max(count - 1, 1)) for i in range(count)]


def samples(
    lengths: Sequence[int],
    depths: Sequence[int],
    count: Callable[[str], int],
    *,
    needle: Needle = Needle(),
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 30,
    template_tokens: int = 0,
    chat: bool = True,
) -> list[Sample]:
    """One sample for each length, in tokens, and depth, in per cent; its group is "<length>/<depth>".

    tokens(prompt) + `max_new_tokens` + `template_tokens`, those of a chat template, never exceed the length, and come
    near it. The needle stands behind the last full stop before its depth. `folder` holds .txt files to hide it in;
    without one it is our chronicle. Raises `InputError` for a length too small or a depth that is none.
    """
    if wrong := [depth for depth in depths if not 0 <= depth <= 100]:
        raise InputError(f"depths must lie between 0 and 100 per cent, got {wrong[0]}")
    if not lengths or min(lengths) < 1:
        raise InputError(f"lengths must be 1 token or more, got {list(lengths)}")
    words = haystack.words(max(lengths), seed, folder)
    found = []
    for length in lengths:
        limit = length - max_new_tokens - template_tokens
        # At full length the depth makes no difference but for a token or two: one search serves them all.
        size = haystack.largest(_tokens(count, needle, words, 50, "", seed), limit, 0, length)
        for depth in depths:
            group = f"{length}/{depth}"
            tokens = _tokens(count, needle, words, depth, group, seed)
            fits = haystack.shrunk(tokens, limit, size, 0)
            if fits is None:
                least = tokens(0) + length - limit
                raise InputError(f"needle does not fit into length {length:,}: the least is {least:,} tokens")
            context, question, answer = _cell(needle, words[: fits[0]], depth, group, seed)
            found.append(Sample("needle", group, context, question, (answer,), max_new_tokens, chat=chat, group=group))
    return found


def _tokens(
    count: Callable[[str], int], needle: Needle, words: list[str], depth: int, group: str, seed: int
) -> Callable[[int], int]:
    """What a cell of so many words takes."""

    def tokens(size: int) -> int:
        context, question, _ = _cell(needle, words[:size], depth, group, seed)
        return count(context + question)

    return tokens


def _cell(needle: Needle, words: list[str], depth: int, group: str, seed: int) -> tuple[str, str, str]:
    """Context, question and answer."""
    rng = random.Random(f"{seed}/{group}")
    drawn = {"{key}": rng.choice(KEYS), "{number}": str(rng.randrange(1_000_000, 10_000_000))}

    def fill(text: str) -> str:
        for name, value in drawn.items():
            text = text.replace(name, value)
        return text

    at = insertion(words, depth)
    text = " ".join([*words[:at], fill(needle.text), *words[at:]])
    return INTRODUCTION + text, "\n\n" + fill(needle.question), fill(needle.answer)


def insertion(words: Sequence[str], depth: int) -> int:
    """How many words stand before the needle: up to a full stop, or 0; all of them at 100 per cent."""
    if depth == 100:
        return len(words)
    at = len(words) * depth // 100
    while at and not words[at - 1].endswith("."):
        at -= 1
    return at
