"""Needles in long texts: numbers hidden in them, and a question for one at the end.

The haystack is our own chronicle, or the .txt files of a folder: prose is harder than our few sentences.
"""

import json
import random
from pathlib import Path

from fastkv_jax.evals.texts.documents import document
from fastkv_jax.seeds import check_seed

KEYS = "harbor lantern meadow copper thistle orchard compass marble falcon cedar velvet ember granite willow".split()
TOKENS_PER_WORD = 1.35  # English prose through SmolLM2's tokenizer; only the lengths depend on it
TASK = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)


def make(
    count: int, shortest: int, longest: int, seed: int, haystack: Path | None = None, keys: int = 1
) -> list[dict[str, str]]:
    """`2 * count` questions over texts of `shortest` to `longest` tokens, evenly spread.

    Each is asked twice, plainly and with the beginning of the answer given. With `keys` > 1 as many numbers are hidden,
    each under a key of its own, and one is asked for.
    """
    check_seed(seed)
    rows = []
    for i in range(count):
        rng = random.Random(seed * 1_000_003 + i)
        tokens = shortest + (longest - shortest) * i // max(count - 1, 1)
        key, number = rng.choice(KEYS), str(rng.randrange(1_000_000, 10_000_000))
        sentences = _text(haystack, int(tokens / TOKENS_PER_WORD) - 40, rng)
        sentences.insert(rng.randrange(len(sentences) + 1), _needle(key, number))
        for other in rng.sample([k for k in KEYS if k != key], keys - 1):
            place = rng.randrange(len(sentences) + 1)
            sentences.insert(place, _needle(other, str(rng.randrange(1_000_000, 10_000_000))))
        question = f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        row = {"id": f"{i}", "prompt": TASK + " ".join(sentences) + question, "answer": number}
        prefix = f"The special magic number for {key} mentioned in the provided text is"
        rows += [row, {**row, "id": f"{i}-prefix", "prefill": prefix}]
    return rows


def _needle(key: str, number: str) -> str:
    return f"One of the special magic numbers for {key} is: {number}."


def _text(haystack: Path | None, words: int, rng: random.Random) -> list[str]:
    """About `words` words of text, cut into sentences."""
    if haystack is None:
        text = document(words, rng.randrange(1 << 30)).split()
    else:
        text = rng.choice(sorted(haystack.glob("*.txt"))).read_text(encoding="utf-8", errors="replace").split()
        first = rng.randrange(max(len(text) - words, 1))
        text = text[first : first + words]
    return " ".join(text[:words]).replace(". ", ".\n").split("\n")


def score(needles: Path, answers: Path) -> dict[str, int]:
    """How many answers hold their number, with and without the prefix given."""
    said = {row["id"]: row.get("text", "") for row in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
    result = {"plain": 0, "prefix": 0, "of": 0}
    for row in map(json.loads, needles.read_text(encoding="utf-8").splitlines()):
        result["prefix" if "prefill" in row else "plain"] += row["answer"] in said.get(row["id"], "")
        result["of"] += "prefill" not in row
    return result
