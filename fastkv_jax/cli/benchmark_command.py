"""What a user of generate.py waits for: seconds from the command to the first token, and the peak of its memory.

Each run is a process of its own, as a shell would start it, and so is what full context's bare prefill of as many
tokens takes, everything loaded and compiled. Programs are compiled and kept in a first round that does not count, but
for the run that keeps none. This process itself needs no device.

  benchmark.py command --tokens 1900 7250 --repeats 5
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastkv_jax import checkpoint, text
from fastkv_jax.benchmarks.processes import Waited, wait_for
from fastkv_jax.cli.asking.report import Reporter
from fastkv_jax.cli.flags import common
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals.texts.documents import document

QUESTION = "What is the secret number of the harbour safe?"


def parser() -> common.Parser:
    """All flags, with their ranges."""
    parser = common.Parser(prog="benchmark.py command", description=__doc__)
    common.add_model_flags(parser)
    group = parser.add_argument_group("what to time")
    group.add_argument("--tokens", type=int, nargs="+", default=[1900], metavar="N", help="lengths of the document, "
                       ">= 64 (default: 1900)")  # fmt: skip
    group.add_argument("--chunk", type=int, default=1024, metavar="N", help="of the run with --prefill-chunk, >= 1 "
                       "(default: 1024)")  # fmt: skip
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="timed rounds, >= 1 (default: 3)")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    common.add_device_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return common.run(_run, parser().parse(argv))


def _run(options: argparse.Namespace) -> int:
    for name, value, least in (
        ("tokens", min(options.tokens), 64), ("chunk", options.chunk, 1), ("repeats", options.repeats, 1)
    ):  # fmt: skip
        if value < least:
            raise FastKVConfigError(f"{name} must be >= {least}, got {value}")
    say = Reporter(quiet=options.quiet)
    found = checkpoint.resolve(options.model, tokenizer=options.tokenizer, progress=not options.quiet)
    tokenizer = text.load_tokenizer(found)
    shared = ["--model", options.model, "--platform", options.platform, "--dtype", options.dtype]
    shared += [] if options.mem_fraction is None else ["--mem-fraction", str(options.mem_fraction)]
    variants = {
        "full": ["--method", "full"],
        "preset": [],
        "preset, nothing compiled before": ["--no-compile-cache"],
        f"preset, --prefill-chunk {options.chunk}": ["--prefill-chunk", str(options.chunk)],
    }
    rows: list[dict[str, Any]] = []
    device: dict[str, Any] = {}
    for tokens in options.tokens:
        prompt, count = _prompt(tokenizer, tokens)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "prompt.txt"
            file.write_text(prompt, encoding="utf-8")
            asked = ["generate", *shared, "-n", "2", "--prompt-file", str(file)]
            runs = {name: partial(wait_for, [*asked, *more]) for name, more in variants.items()}
            bare = ["benchmark", *shared, "--method", "full", "--tokens", str(count)]
            bare += ["--new-tokens", "16", "--repeats", "1", "--no-rates", "--json"]
            device = _race(runs, partial(wait_for, bare), count, options.repeats, say, rows)
    usage = [wait_for(["generate", "--help"]) for _ in range(options.repeats)]
    result = {
        **{name: device[name] for name in ("device", "jax", "model", "dtype")},
        "repeats": options.repeats, "help_s": statistics.median(run.whole for run in usage), "rows": rows,
    }  # fmt: skip
    print(json.dumps(result) if options.json else _table(result))
    return common.OK


def _prompt(tokenizer, tokens: int) -> tuple[str, int]:
    """A chronicle of about so many tokens with the question behind it, and how many they are in the chat."""
    ids = text.continue_with(tokenizer, document(tokens))[:tokens]
    prompt = f"{tokenizer.decode(ids)}\n\n{QUESTION}"
    encode = text.encode_chat if text.has_chat_template(tokenizer) else text.encode_raw
    return prompt, len(encode(tokenizer, prompt).token_ids)


def _race(
    runs: dict[str, Callable[[], Waited]],
    bare: Callable[[], Waited],
    count: int,
    repeats: int,
    say: Reporter,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Add medians and ranges of interleaved rounds to `rows`; the first round fills caches and does not count.

    Returns what the benchmark of the bare prefill says of the machine.
    """
    waited: dict[str, list[Waited]] = {name: [] for name in runs}
    alone: list[float] = []
    machine: dict[str, Any] = {}
    for turn in range(repeats + 1):
        machine = json.loads(bare().out)
        seconds = machine["rows"][0]["prefill_s"]
        say.line("round", f"{turn}{' (warm-up)' if not turn else ''}  {count:,} tokens  bare prefill {seconds:.2f} s")
        if turn:
            alone.append(seconds)
        for name, run in runs.items():
            one = run()
            say.line("", f"{name}: first token after {one.first:.2f} s, peak {one.peak / 1e9:.2f} GB")
            if turn:
                waited[name].append(one)
    for name, found in waited.items():
        first = [run.first for run in found]
        rows.append({
            "tokens": count, "name": name,
            "first_s": statistics.median(first), "first_range_s": [min(first), max(first)],
            "whole_s": statistics.median(run.whole for run in found),
            "bare_prefill_s": statistics.median(alone),
            "peak_bytes": int(statistics.median(run.peak for run in found)),
        })  # fmt: skip
    return machine


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['model']}, {found['dtype']}, {found['repeats']} rounds; {found['device']}, jax {found['jax']}; "
        f"--help takes {found['help_s']:.2f} s",
        "",
        "| tokens | run | first token, s (min–max) | over full context's bare prefill | peak memory, GB |",
        "| --: | :-- | --: | --: | --: |",
    ]
    for row in found["rows"]:
        low, high = row["first_range_s"]
        bare = row["bare_prefill_s"]
        lines.append(f"| {row['tokens']:,} | {row['name']} | {row['first_s']:.2f} ({low:.2f}–{high:.2f}) "
                     f"| {row['first_s'] / bare:.2f} × {bare:.2f} s | {row['peak_bytes'] / 1e9:.3f} |")  # fmt: skip
    return "\n".join(lines)
