"""The table of docs/methods.md: every method on needles and perplexity, at several budgets, with what it costs.

  compare_methods.py --output docs/methods_table.md

Prints a Markdown table. Texts are our own chronicle, or pieces of the .txt files of a folder (--haystack FOLDER).
The cache's bytes are a share of full context's in the model's dtype.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import fastkv_jax as fk
from fastkv_jax import files, text
from fastkv_jax.cli.flags import common
from fastkv_jax.evals.compare import Question, Row, compare, methods_at
from fastkv_jax.evals.texts import needles
from fastkv_jax.evals.texts.documents import document
from fastkv_jax.methods import presets


def questions(tokenizer, count: int, keys: int, haystack: Path | None) -> list[Question]:
    """Needles of 1,000 to 1,900 tokens, the beginning of the answer given."""
    made = []
    for row in needles.make(count, 1000, 1900, seed=keys, haystack=haystack, keys=keys):
        if "prefill" not in row:
            continue
        encoded = text.encode_chat(tokenizer, row["prompt"], prefill=row["prefill"])
        digits = text.continue_with(tokenizer, row["answer"])
        answer = text.continue_with(tokenizer, " " + row["answer"])
        ids = np.array(encoded.token_ids)
        runs = np.lib.stride_tricks.sliding_window_view(ids, len(digits))
        first = int(np.flatnonzero((runs == digits).all(axis=1))[0])
        made.append(Question(encoded.token_ids, encoded.window_end, answer, np.arange(first, first + len(digits))))
    return made


def texts(tokenizer, count: int, length: int, haystack: Path | None) -> list[list[int]]:
    """Pieces of `length` tokens."""
    pieces = []
    for seed in range(count):
        rng = random.Random(seed)
        if haystack is None:
            words = document(2 * length, seed)
        else:
            words = rng.choice(sorted(haystack.glob("*.txt"))).read_text(encoding="utf-8", errors="replace")
        ids = text.continue_with(tokenizer, words)
        first = rng.randrange(max(len(ids) - length, 1))
        pieces.append(ids[first : first + length])
    return pieces


def render(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| method | budget | one number | of four | answer kept | perplexity | prefill FLOPs | cache |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, _, rate = row.name.partition("@")
        right = [f"{sum(found)}/{len(found)}" for found in row.right.values()]
        perplexity = f"{np.exp(np.mean(row.nll)):.2f}" if row.nll else ""
        shares = (f"{100 * np.mean(share):.0f} %" for share in (row.kept, row.flops, row.bytes))
        kept, flops, size = shares
        flops = "varies" if isinstance(row.method, fk.ASL) else flops  # with the layer that each prompt chooses
        lines.append(f"| {name} | {rate} | {' | '.join(right)} | {kept} | {perplexity} | {flops} | {size} |")
    return "\n".join(lines) + "\n"


def shares(words: str) -> tuple[float, ...]:
    """0.1,0.2 -> 0.1, 0.2."""
    return tuple(map(float, filter(None, words.split(","))))


def main() -> int:
    """Run the command; returns the exit code."""
    parser = common.Parser(prog="compare_methods.py", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=16, help="needles of each of the two kinds, >= 1")
    parser.add_argument("--texts", type=int, default=4, help="texts for the perplexity, of 2,048 tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--budgets", type=shares, default="0.1,0.2,0.5", help="shares of the entries that stay, or none"
    )
    parser.add_argument("--kv-dtypes", default="", help="also full context and the preset with caches of int8, ...")
    parser.add_argument("--haystack", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path)
    common.add_run_flags(parser)
    return common.run(_compare, parser.parse(None))


def _compare(options: argparse.Namespace) -> int:
    """Print the table."""
    if options.output is not None:
        files.check_target(options.output)
    common.choose_platform(options)
    common.use_compile_cache(options)
    model, tokenizer = fk.load_model(options.model, dtype=options.dtype), fk.load_tokenizer(options.model)
    layers = model.config.num_layers
    rows = [Row("full@100 %", fk.FullKV())]
    for rate in options.budgets:
        rows += [Row(f"{name}@{rate:.0%}".replace("%", " %"), method) for name, method in methods_at(rate, layers)]
    preset = presets.build("fastkv", presets.for_model(options.model), {}, layers)
    rows += [Row("fastkv@preset", preset), *([Row("pyramidinfer@", fk.PyramidInfer())] if options.budgets else [])]
    for dtype in filter(None, options.kv_dtypes.split(",")):
        rows += [Row(f"full@{dtype}", fk.FullKV(), dtype), Row(f"fastkv@preset, {dtype}", preset, dtype)]
    asked = {str(keys): questions(tokenizer, options.count, keys, options.haystack) for keys in (1, 4)}
    pieces = texts(tokenizer, options.texts, 2048, options.haystack)
    with tqdm(total=2 * options.count + options.texts, unit="text", file=sys.stderr) as bar:

        def report() -> None:
            bar.update()
            if options.output is not None:  # what is known so far
                with files.replacing(options.output) as scratch:
                    scratch.write_text(render(rows), encoding="utf-8")

        compare(model, rows, asked, pieces, 2048, report)
    sys.stdout.write(render(rows))
    return common.OK


if __name__ == "__main__":
    common.leave(main())
