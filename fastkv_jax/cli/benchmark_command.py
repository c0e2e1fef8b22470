"""What a user of generate.py waits for: seconds from the command to the first token, and the peak of its memory.

Each run is a process of its own, as a shell would start it; what full context's bare prefill of the same prompt takes is
measured in between, in this process. Programs are compiled and kept in a first round that does not count, but for the
run that keeps none.

  benchmark.py command --tokens 1900 7250 --repeats 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastkv_jax.cli import common
from fastkv_jax.errors import FastKVConfigError

QUESTION = "What is the secret number of the harbour safe?"
KIB = 1 if sys.platform == "darwin" else 1024  # what a process's peak memory is counted in


class Waited(NamedTuple):
    """For one process."""

    first: float  # seconds to the first character on stdout
    whole: float
    peak: int  # bytes


def parser() -> common.Parser:
    """All flags, with their ranges."""
    parser = common.Parser(prog="benchmark.py command", description=__doc__)
    group = common.add_model_flags(parser)
    group = parser.add_argument_group("what to time")
    group.add_argument("--tokens", type=int, nargs="+", default=[1900], metavar="N", help="lengths of the document, "
                       ">= 64 (default: 1900)")  # fmt: skip
    group.add_argument("--chunk", type=int, default=1024, metavar="N", help="of the run with --prefill-chunk, >= 1 "
                       "(default: 1024)")  # fmt: skip
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="timed rounds, >= 1 (default: 3)")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    common.add_run_flags(parser)
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
    platform = common.choose_platform(options)
    common.use_compile_cache()
    import jax

    from fastkv_jax import checkpoint, text
    from fastkv_jax.cli.report import Reporter

    say = Reporter(quiet=options.quiet)
    dtype = common.dtype_for(options, platform)
    say.header(platform, dtype)
    found = checkpoint.resolve(options.model, progress=not options.quiet)
    tokenizer, model = text.load_tokenizer(found), checkpoint.load_model(found, dtype)
    shared = ["--model", options.model, "--platform", platform, "--dtype", dtype, "-n", "2"]
    variants = {
        "full": ["--method", "full"],
        "preset": [],
        "preset, nothing compiled before": ["--no-compile-cache"],
        f"preset, --prefill-chunk {options.chunk}": ["--prefill-chunk", str(options.chunk)],
    }
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        prompt, count = _prompt(tokenizer, tokens)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "prompt.txt"
            file.write_text(prompt, encoding="utf-8")
            asked = [*shared, "--prompt-file", str(file)]
            runs = {name: lambda more=more, asked=asked: wait_for([*asked, *more]) for name, more in variants.items()}
            rows += _race(runs, _bare(model, tokenizer, prompt), count, options.repeats, say)
    usage = [wait_for(["--help"]) for _ in range(options.repeats)]
    found = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "model": found.name, "dtype": dtype,
        "repeats": options.repeats, "help_s": statistics.median(run.whole for run in usage), "rows": rows,
    }  # fmt: skip
    print(json.dumps(found) if options.json else _table(found))
    return common.OK


def wait_for(words: list[str]) -> Waited:
    """Run `generate.py` with these words. Raises `RuntimeError` with its last line if it fails."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "fastkv_jax", "generate", *words]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            first = time.perf_counter() - began
            process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        whole = time.perf_counter() - began
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(errors.read().decode(errors="replace").strip().splitlines()[-1])
    return Waited(first, whole, usage.ru_maxrss * KIB)


def _prompt(tokenizer, tokens: int) -> tuple[str, int]:
    """A chronicle of about so many tokens with the question behind it, and how many they are in the chat."""
    from fastkv_jax import text
    from fastkv_jax.evals.documents import document

    ids = text.continue_with(tokenizer, document(tokens))[:tokens]
    prompt = f"{tokenizer.decode(ids)}\n\n{QUESTION}"
    return prompt, len(_encoded(tokenizer, prompt))


def _encoded(tokenizer, prompt: str) -> list[int]:
    from fastkv_jax import text

    encode = text.encode_chat if text.has_chat_template(tokenizer) else text.encode_raw
    return encode(tokenizer, prompt).token_ids


def _bare(model, tokenizer, prompt: str) -> Callable[[], float]:
    """Seconds of full context's prefill, everything loaded and compiled."""
    import jax

    from fastkv_jax import buckets, inference
    from fastkv_jax.methods import FullKV

    tokens, start = buckets.pad_batch([_encoded(tokenizer, prompt)])

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(inference.prefill(model, tokens, start, method=FullKV(), max_new_tokens=2))
        return time.perf_counter() - began

    return run


def _race(runs: dict[str, Callable[[], Waited]], bare, count: int, repeats: int, say) -> list[dict[str, Any]]:
    """Medians and ranges of interleaved rounds; the first one fills caches and does not count."""
    waited: dict[str, list[Waited]] = {name: [] for name in runs}
    alone: list[float] = []
    for turn in range(repeats + 1):
        seconds = bare()
        say.line("round", f"{turn}{' (warm-up)' if not turn else ''}  {count:,} tokens  bare prefill {seconds:.2f} s")
        if turn:
            alone.append(seconds)
        for name, run in runs.items():
            one = run()
            say.line("", f"{name}: first token after {one.first:.2f} s, peak {one.peak / 1e9:.2f} GB")
            if turn:
                waited[name].append(one)
    rows = []
    for name, found in waited.items():
        first = [run.first for run in found]
        rows.append({
            "tokens": count, "name": name,
            "first_s": statistics.median(first), "first_range_s": [min(first), max(first)],
            "whole_s": statistics.median(run.whole for run in found),
            "bare_prefill_s": statistics.median(alone),
            "peak_bytes": int(statistics.median(run.peak for run in found)),
        })  # fmt: skip
    return rows


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
