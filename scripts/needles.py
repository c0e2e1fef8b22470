"""Needles in long texts: make questions for `generate.py --input`, and score its answers.

  needles.py make --count 32 > needles.jsonl
  generate.py --input needles.jsonl --output answers.jsonl --max-new-tokens 24
  needles.py score needles.jsonl answers.jsonl

Each needle is asked for twice, with and without the beginning of the answer given. The haystack is our own chronicle,
or the .txt files of a folder (--haystack FOLDER): prose is harder than our few sentences.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from make_document import document

KEYS = "harbor lantern meadow copper thistle orchard compass marble falcon cedar velvet ember granite willow".split()
TOKENS_PER_WORD = 1.35  # English prose through SmolLM2's tokenizer; only the lengths depend on it
TASK = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)


def make(count: int, shortest: int, longest: int, seed: int, haystack: Path | None) -> list[dict[str, str]]:
    """`2 * count` questions over texts of `shortest` to `longest` tokens, evenly spread."""
    rows = []
    for i in range(count):
        rng = random.Random(seed * 1_000_003 + i)
        tokens = shortest + (longest - shortest) * i // max(count - 1, 1)
        key, number = rng.choice(KEYS), str(rng.randrange(1_000_000, 10_000_000))
        sentences = _text(haystack, int(tokens / TOKENS_PER_WORD) - 40, rng)
        sentences.insert(rng.randrange(len(sentences) + 1), f"One of the special magic numbers for {key} is: {number}.")
        question = f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        row = {"id": f"{i}", "prompt": TASK + " ".join(sentences) + question, "answer": number}
        prefix = f"The special magic number for {key} mentioned in the provided text is"
        rows += [row, {**row, "id": f"{i}-prefix", "prefill": prefix}]
    return rows


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


def main() -> int:
    """Print questions as JSON lines, or one line of scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write questions to stdout")
    maker.add_argument("--count", type=int, default=32)
    maker.add_argument("--shortest", type=int, default=1500, metavar="TOKENS")
    maker.add_argument("--longest", type=int, default=3500, metavar="TOKENS")
    maker.add_argument("--seed", type=int, default=0)
    maker.add_argument("--haystack", type=Path, metavar="FOLDER", help="texts to hide the needles in")
    scorer = commands.add_parser("score", help="count right answers")
    scorer.add_argument("needles", type=Path)
    scorer.add_argument("answers", type=Path)
    options = parser.parse_args()
    if options.command == "make":
        for row in make(options.count, options.shortest, options.longest, options.seed, options.haystack):
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        result = score(options.needles, options.answers)
        print(f"right: {result['plain']} of {result['of']} plain, {result['prefix']} of {result['of']} with prefix")
    return 0


if __name__ == "__main__":
    sys.exit(main())
