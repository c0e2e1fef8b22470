"""RULER's prompts made here, for 11 of its 13 tasks: by its rules, with our own words and, for essays, our own text.

The rows are not NVIDIA's, whose words change with the version of a package; for numbers to publish, use its generator.
The same task, length, seed and tokenizer give the same rows on every machine: see `digest`.
"""

import hashlib
import json
import os
import random
import string
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import pi
from typing import Any, NamedTuple

from fastkv_jax.errors import InputError
from fastkv_jax.evals.suites import grids, ruler
from fastkv_jax.evals.texts import haystack, words

_SUITE = grids.load("ruler")
NOISE: str = _SUITE["noise"]
NEEDLE: str = _SUITE["needle"]
DEPTHS = [round(100 * i / 39) for i in range(40)]  # in per cent: where a needle may stand in a text
HOPS = 4
COMMON = 10  # words that are asked for
SHORT = 4_096  # below it, common words stand fewer times
EXAMPLE_TOKENS = 500  # of the example before a chain of variables
ZETA_2 = pi**2 / 6  # the sum of 1 / rank**2, over coded words by their rank


class Draft(NamedTuple):
    """A prompt in parts."""

    context: str
    question: str
    prefix: str
    answers: list[str]


@dataclass(frozen=True)
class Maker:
    """Makes one task's prompts of any size: so many noises, words or needles around what is asked for."""

    task: ruler.Task
    length: int  # tokens of prompt, chat template and answer together
    limit: int  # without the template
    count: Callable[[str], int]  # a text's tokens, without special tokens
    seed: int
    smallest: int
    most: int  # never more than fits
    text: tuple[str, ...] = ()  # the haystack
    example: int = 0  # size of the example

    def draft(self, i: int, size: int) -> Draft:
        """Sample `i` at this size."""
        rng = random.Random(f"{self.seed}/{self.task.name}/{i}")
        return _DRAFT[self.task.kind](self, size, rng)

    def tokens(self, i: int, size: int) -> int:
        """What sample `i` takes at this size: prompt, answer prefix and the answer's budget."""
        draft = self.draft(i, size)
        return self.count(draft.context + draft.question + draft.prefix) + self.task.max_new_tokens


def rows(
    name: str,
    length: int,
    samples: int,
    count: Callable[[str], int],
    *,
    seed: int = 42,
    essays: str | os.PathLike[str] | None = None,
    template_tokens: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of NVIDIA's form: index, input, outputs, length, answer_prefix.

    tokens(input + answer_prefix) + the answer's budget + `template_tokens`, those of a chat template, never exceed
    `length`, and come near it. `count` gives a text's tokens without special tokens; `essays` is a folder of .txt
    files to use instead of our chronicle. Raises `InputError` if the length is too small or too large for the task, or
    the task is a `qa`, which needs data that cannot be made.
    """
    task = ruler.task(name)
    if task.kind == "qa":
        raise InputError(f"{name} cannot be generated: give a file of NVIDIA's generator")
    limit = length - template_tokens
    maker = _maker(task, length, limit, count, seed, essays)
    if (least := maker.tokens(0, maker.smallest)) > limit:
        raise InputError(f"{name} does not fit into length {length:,}: the least is {least + template_tokens:,} tokens")
    size = haystack.largest(lambda size: maker.tokens(0, size), limit, maker.smallest, maker.most)
    if size == maker.most < limit:
        longest = maker.tokens(0, size) + template_tokens
        raise InputError(f"{name} cannot fill length {length:,}: there are words for {longest:,} tokens")
    return (_row(maker, i, size) for i in range(samples))


def _row(maker: Maker, i: int, size: int) -> dict[str, Any]:
    template_tokens = maker.length - maker.limit
    # Other keys than sample 0's can take more tokens.
    fits = haystack.shrunk(lambda size: maker.tokens(i, size), maker.limit, size, maker.smallest)
    if fits is None:
        least = maker.tokens(i, maker.smallest) + template_tokens
        raise InputError(f"{maker.task.name} sample {i} does not fit: the least is {least:,} tokens")
    size, tokens = fits
    draft = maker.draft(i, size)
    return {
        "index": i,
        "input": draft.context + draft.question,
        "outputs": draft.answers,
        "length": tokens + template_tokens,
        "answer_prefix": draft.prefix,
    }


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """The content of a file that `ruler.read` reads."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def digest(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256, in hex, of the file that `json_lines` gives."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json_lines([row]).encode())
    return found.hexdigest()


def _maker(
    task: ruler.Task,
    length: int,
    limit: int,
    count: Callable[[str], int],
    seed: int,
    essays: str | os.PathLike[str] | None,
) -> Maker:
    def maker(smallest: int, most: int, **more: Any) -> Maker:
        return Maker(task, length, limit, count, seed, smallest, most, **more)

    most = max(limit, 1)  # every word takes a token at least
    if task.needles is not None:
        needles = task.needles
        if needles.haystack == "essay":
            return maker(1, most, text=tuple(haystack.words(most, seed, essays)))
        if needles.haystack == "needle" and needles.key == "words":
            most = min(most, words.COUNT - needles.keys)
        return maker(needles.keys * needles.values, most)
    if task.kind == "vt":
        return maker(HOPS + 1, most, example=_example_size(maker(HOPS + 1, most)))
    if task.kind == "cwe":
        return maker(COMMON + 1, min(most, words.COUNT - 40))
    return maker(73, 2 * most)  # from 73 words on, the first four ranks differ in how often they stand


# ---------------------------------------------------------------------------------------------------------- needles


def _niah(maker: Maker, size: int, rng: random.Random) -> Draft:
    needles = maker.task.needles
    assert needles is not None
    others = size if needles.haystack == "needle" else 0
    keys = _distinct(needles.key, needles.keys + others, rng)
    values = _distinct(needles.value, needles.keys * needles.values + others, rng)
    own = [values[i * needles.values : (i + 1) * needles.values] for i in range(needles.keys)]
    hidden = [_needle(needles, keys[i], value) for i, some in enumerate(own) for value in some]
    rng.shuffle(hidden)
    if needles.haystack == "essay":
        text = _among_sentences(hidden, maker.text[:size], rng)
    else:
        lines = [NOISE] * size
        if others:
            rest = zip(keys[needles.keys :], values[-others:], strict=True)
            lines = [_needle(needles, key, value) for key, value in rest]
        for place, needle in zip(sorted(rng.sample(range(size), len(hidden)), reverse=True), hidden, strict=True):
            lines.insert(place, needle)
        text = "\n".join(lines)
    asked = rng.sample(range(needles.keys), needles.queries)
    *first, last = (keys[i] for i in asked)
    plural = needles.values * needles.queries > 1
    before, after, prefix = maker.task.parts(
        query=", ".join(first) + ", and " + last if first else last,
        type_needle_v=needles.value if plural else needles.value.removesuffix("s"),
    )
    return Draft(before + text, after, prefix, [value for i in asked for value in own[i]])


def _needle(needles: ruler.Needles, key: str, value: str) -> str:
    return NEEDLE.format(type_needle_v=needles.value, key=key, value=value)


def _distinct(kind: str, count: int, rng: random.Random) -> list[str]:
    """No key or value stands twice, or a question would have two answers."""
    if kind == "words":
        return [words.word(i) for i in rng.sample(range(words.COUNT), count)]
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _among_sentences(needles: list[str], text: tuple[str, ...], rng: random.Random) -> str:
    sentences = " ".join(text).replace(". ", ".\n").split("\n")
    places = sorted(len(sentences) * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        sentences.insert(place, needle)
    return " ".join(sentences)


# -------------------------------------------------------------------------------------------------- variable tracking


def _example_size(maker: Maker) -> int:
    """So that the example takes 500 tokens or, of a short prompt, an eighth."""
    limit = min(EXAMPLE_TOKENS, maker.length // 8)

    def tokens(size: int) -> int:
        return maker.count(_example(maker.task, size, "12345", random.Random(maker.seed)))

    return haystack.largest(tokens, limit, maker.smallest, maker.most)


def _vt(maker: Maker, size: int, rng: random.Random) -> Draft:
    value, other = (str(number) for number in rng.sample(range(10_000, 99_999), 2))
    draft = _chain(maker.task, size, value, 5, rng)
    example = _example(maker.task, maker.example, other, rng)
    return draft._replace(context=example + "\n" + draft.context)


def _example(task: ruler.Task, size: int, value: str, rng: random.Random) -> str:
    """A chain of shorter names, and its answer."""
    draft = _chain(task, size, value, 3, rng)
    return draft.context + draft.question + draft.prefix + " " + " ".join(draft.answers) + "\n"


def _chain(task: ruler.Task, size: int, value: str, letters: int, rng: random.Random) -> Draft:
    names = [_letters(i, letters).upper() for i in rng.sample(range(26**letters), HOPS + 1)]
    lines = [NOISE] * size
    steps = [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)),
    ]
    for passed, (place, step) in enumerate(zip(sorted(rng.sample(range(size), len(steps))), steps, strict=True)):
        lines.insert(place + passed, step)
    before, after, prefix = task.parts(query=value, num_v=len(names))
    return Draft(before + "\n".join(lines), after, prefix, names)


def _letters(index: int, count: int) -> str:
    found = ""
    for _ in range(count):
        index, letter = divmod(index, 26)
        found += string.ascii_lowercase[letter]
    return found


# ---------------------------------------------------------------------------------------------- common, frequent words


def _cwe(maker: Maker, size: int, rng: random.Random) -> Draft:
    short = maker.length < SHORT
    shown = 20 if short else 40  # words of the example
    if shown + size <= len(words.SINGLE):
        chosen = rng.sample(words.SINGLE, shown + size)
    else:  # double words, all of them, or the form would tell which are common
        chosen = [words.word(i) for i in rng.sample(range(words.COUNT), shown + size)]
    before, after, prefix = maker.task.parts()
    example = _numbered(_repeated(chosen[:shown], *((3, 1) if short else (10, 3)), rng))
    answer = _numbered(chosen[:COMMON])
    text = _numbered(_repeated(chosen[shown:], *((6, 1) if short else (30, 3)), rng))
    context = f"{before}{example}{after}{prefix} {answer}\n{before}{text}"
    return Draft(context, after, prefix, chosen[shown : shown + COMMON])


def _repeated(chosen: list[str], common: int, rare: int, rng: random.Random) -> list[str]:
    listed = chosen[:COMMON] * common + chosen[COMMON:] * rare
    rng.shuffle(listed)
    return listed


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


def _fwe(maker: Maker, size: int, rng: random.Random) -> Draft:
    ranks = max((maker.limit - maker.task.max_new_tokens) // 50, 5)
    coded = [_letters(i, 6) for i in rng.sample(range(26**6), ranks)]
    coded[0] = "..."  # the most frequent is noise
    text = [word for rank, word in enumerate(coded, 1) for _ in range(int(size / rank**2 / ZETA_2))]
    rng.shuffle(text)
    before, after, prefix = maker.task.parts()
    return Draft(before + " ".join(text), after, prefix, coded[1:4])


_DRAFT: dict[str, Callable[[Maker, int, random.Random], Draft]] = {"niah": _niah, "vt": _vt, "cwe": _cwe, "fwe": _fwe}
