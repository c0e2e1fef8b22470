"""Needles in long texts: make questions for `generate.py --input`, and score its answers.

  needles.py make --count 32 > needles.jsonl
  generate.py --input needles.jsonl --output answers.jsonl --max-new-tokens 24
  needles.py score needles.jsonl answers.jsonl

Each needle is asked for twice, with and without the beginning of the answer given. The haystack is our own chronicle,
or the .txt files of a folder (--haystack FOLDER): prose is harder than our few sentences.
"""

import argparse
import json
import sys
from pathlib import Path

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals.texts import needles


def main() -> int:
    """Print questions as JSON lines, or one line of scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write questions to stdout")
    maker.add_argument("--count", type=int, default=32)
    maker.add_argument("--shortest", type=int, default=1500, metavar="TOKENS")
    maker.add_argument("--longest", type=int, default=3500, metavar="TOKENS")
    maker.add_argument("--seed", type=int, default=0, help="0 to 2**32 - 1")
    maker.add_argument(
        "--keys", type=int, default=1, help="numbers hidden in each text, one of them asked for, 1 to 14"
    )
    maker.add_argument("--haystack", type=Path, metavar="FOLDER", help="texts to hide the needles in")
    scorer = commands.add_parser("score", help="count right answers")
    scorer.add_argument("needles", type=Path)
    scorer.add_argument("answers", type=Path)
    options = parser.parse_args()
    if options.command == "make":
        o = options
        try:
            rows = needles.make(o.count, o.shortest, o.longest, o.seed, o.haystack, o.keys)
        except FastKVConfigError as error:
            parser.error(str(error))
        for row in rows:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        result = needles.score(options.needles, options.answers)
        print(f"right: {result['plain']} of {result['of']} plain, {result['prefix']} of {result['of']} with prefix")
    return 0


if __name__ == "__main__":
    sys.exit(main())
