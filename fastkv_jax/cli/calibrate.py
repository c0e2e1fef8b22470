"""Choose FastKV's TSP layer, window and kernel for a model, by measuring on questions whose answers are known.

  calibrate_tsp.py --model smollm2-135m --output preset.yaml --plot curves.png
  calibrate_tsp.py --model YOUR_MODEL --input questions.jsonl --output preset.yaml
  generate.py --model YOUR_MODEL --preset preset.yaml ...

Every setting is surveyed in one full pass per question: does the answer pass TSP, does the cache hold it? The settings
that promise most are then tried in earnest, at every layer. Chosen is the earliest layer (the cheapest prefill), then
the smallest kernel and window, that answers as many questions as the full context.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkv_jax.cli.asking.prompts import read_text
from fastkv_jax.cli.flags import common
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.json_lines import values
from fastkv_jax.seeds import check_seed

MOST_INTEGERS = 1000  # in one flag


def parser() -> common.Parser:
    """All flags."""
    parser = common.Parser(prog="calibrate_tsp.py", description=__doc__)
    common.add_model_flags(parser)
    group = parser.add_argument_group("questions")
    group.add_argument("--input", metavar="FILE", help="JSON lines with prompt, answer and optional prefill")
    group.add_argument("--count", type=int, metavar="N", help="without --input: hidden numbers, >= 1 (default: 16)")
    group.add_argument("--tokens", type=lengths, metavar="N|A-B", help="length of their texts (default: 2048)")
    group.add_argument("--haystack", type=Path, metavar="FOLDER", help="the .txt files to hide them in")
    group.add_argument("--seed", type=int, metavar="N", help="of the numbers and texts, 0 to 2**32 - 1 (default: 0)")
    group.add_argument("--max-new-tokens", type=int, default=24, metavar="N", help="decoded, >= 1 (default: 24)")
    common.add_template_flags(group)
    group = parser.add_argument_group("what to try (lists of integers: 8,16,32 or 8-20)")
    group.add_argument("--layers", type=integers, metavar="LIST", help="TSP layers (default: the middle half)")
    group.add_argument("--windows", type=integers, default=(8, 16, 32), metavar="LIST", help="default: 8,16,32")
    group.add_argument("--kernels", type=integers, default=(7, 13, 21, 31), metavar="LIST", help="default: 7,13,21,31")
    group.add_argument("--pooling", choices=("max", "avg", "both"), default="max", help="default: max")
    group.add_argument("--finalists", type=int, default=3, metavar="N", help="settings tried, >= 1 (default: 3)")
    group.add_argument("--tsp-rate", type=float, default=0.2, metavar="R", help="in (0, 1] (default: 0.2)")
    group.add_argument("--retention-rate", type=float, default=0.2, metavar="R", help="in (0, 1] (default: 0.2)")
    group.add_argument("--tolerance", type=float, default=0.1, metavar="R",
                       help="eq. 3: distances up to 1 + R times the smallest are close (default: 0.1)")  # fmt: skip
    group = parser.add_argument_group("results")
    group.add_argument("--output", metavar="FILE.yaml", help="the preset, with the evidence")
    group.add_argument("--plot", metavar="FILE.png", help="the curves (needs matplotlib)")
    group.add_argument("--overwrite", action="store_true", help="replace existing files")
    group.add_argument("--timed", action="store_true", help="also time the prefill, full and chosen in turns")
    group.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    common.add_run_flags(parser)
    return parser


def integers(words: str) -> tuple[int, ...]:
    """8,10-12 -> 8, 10, 11, 12."""
    found: list[int] = []
    for word in words.split(","):
        first, dash, last = word.strip().partition("-")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
        if not found or len(found) > MOST_INTEGERS:
            raise ValueError(words)
    return tuple(found)


def lengths(words: str) -> tuple[int, int]:
    """2048 -> 2048, 2048; 1500-3000 -> 1500, 3000."""
    first, _, last = words.partition("-")
    return int(first), int(last or first)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse(argv)
    return common.run(_run, options)


def _run(options: argparse.Namespace) -> int:
    _check(options)
    rows = _rows(options)
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    _calibrate(options, rows, platform, common.dtype_for(options, platform))
    return common.OK


def _check(options: argparse.Namespace) -> None:
    """All that needs neither model nor questions."""
    from fastkv_jax.calibration.result import check_path
    from fastkv_jax.methods import FastKV

    for flag, suffix in (("output", ".yaml"), ("plot", ".png")):
        name = getattr(options, flag)
        if name is not None and check_path(name, suffix).exists() and not options.overwrite:
            raise InputError(f"--{flag} {name} exists; give --overwrite to replace it")
    for flag, least in (("count", 1), ("finalists", 1), ("max_new_tokens", 1)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise FastKVConfigError(f"{flag} must be >= {least}, got {value}")
    check_seed(options.seed or 0)
    if not 0 <= options.tolerance < math.inf:
        raise FastKVConfigError(f"tolerance must be >= 0, got {options.tolerance}")
    for window in options.windows:
        for kernel in options.kernels:
            FastKV(tsp_layer=0, tsp_rate=options.tsp_rate, retention_rate=options.retention_rate, window_size=window,
                   kernel_size=kernel)  # fmt: skip


def _rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The questions of --input, or needles of our own making."""
    from fastkv_jax.evals.texts import needles

    if options.input is not None:
        for flag in ("count", "tokens", "haystack", "seed"):
            if getattr(options, flag) is not None:
                raise InputError(f"--{flag} and --input exclude each other")
        return _json_lines(options.input)
    if options.haystack is not None and not any(options.haystack.glob("*.txt")):
        raise InputError(f"--haystack {options.haystack} holds no .txt files")
    (shortest, longest), count = options.tokens or (2048, 2048), options.count or 16
    if not 100 <= shortest <= longest:
        raise FastKVConfigError(f"tokens must rise from >= 100, got {shortest}-{longest}")
    rows = needles.make(count, shortest, longest, options.seed or 0, options.haystack)
    return [rows[2 * i + i % 2] for i in range(count)]  # one plain, the next with the beginning of its answer given


def _json_lines(name: str) -> list[dict[str, Any]]:
    try:
        rows = [row for _, row in values(read_text(name))]
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON lines: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"each line of {name} must be an object with prompt and answer")
    return rows


def _calibrate(options: argparse.Namespace, rows: list[dict[str, Any]], platform: str, dtype: str) -> None:
    from tqdm import tqdm

    from fastkv_jax import checkpoint, text
    from fastkv_jax.calibration.measuring import calibrate
    from fastkv_jax.calibration.samples import make_samples
    from fastkv_jax.cli.asking.report import Reporter
    from fastkv_jax.methods import FastKV

    say = Reporter(quiet=options.quiet)
    found = checkpoint.resolve(options.model, tokenizer=options.tokenizer, progress=not options.quiet)
    config = checkpoint.inspect(found)
    for layer in options.layers or ():
        FastKV(tsp_layer=layer).check(config.num_layers)
    tokenizer = text.load_tokenizer(found)
    text.check_vocabulary(tokenizer, config)
    rendering = common.rendering(options)
    rendering.check(tokenizer)
    samples = make_samples(tokenizer, rows, rendering)
    say.header(platform, dtype)
    say.attention(platform, dtype, config.head_dim)
    tokens = [len(sample.token_ids) for sample in samples]
    say.line("samples", f"{len(samples)}, {min(tokens):,} to {max(tokens):,} tokens; "
             f"{sum(s.span is not None for s in samples)} hold their answer")  # fmt: skip
    model = checkpoint.load_model(found, dtype)
    with tqdm(desc="measuring", file=sys.stderr, disable=options.quiet, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = calibrate(
            model, samples, name=found.name, layers=options.layers, window_sizes=options.windows,
            kernel_sizes=options.kernels, poolings=("max", "avg") if options.pooling == "both" else (options.pooling,),
            tsp_rate=options.tsp_rate, retention_rate=options.retention_rate, tolerance=options.tolerance,
            finalists=options.finalists, max_new_tokens=options.max_new_tokens, tokenizer=tokenizer,
            timed=options.timed, progress=progress,
        )  # fmt: skip
    if options.output is not None:
        result.save(options.output)
    if options.plot is not None:
        result.plot(options.plot)
    if options.json:
        print(json.dumps({"preset": result.preset(), "calibration": result.evidence()}))
    else:
        _print(result)


def _print(result: Any) -> None:
    """What decided, then what was chosen and what it costs."""
    print(f"share of the answers' own tokens that TSP would let through, mean of layers {result.layers[0]} to "
          f"{result.layers[-1]}; * = tried\n")  # fmt: skip
    columns = list(result.layers)
    for setting, shares in zip(result.settings, result.propagated, strict=True):
        print(f"  {setting!s:<22}{shares[columns].mean():>7.1%}{' *' if setting in result.finalists else ''}")
    print(f"\nTSP after this layer: distance to full context (eq. 3), answers let through, right of {result.answers}\n")
    print("layer" + "".join(f"  {setting!s:>25}" for setting in result.finalists))
    for column, layer in enumerate(result.layers):
        cells = [
            f"  {distance[column]:>10.4f}{result.propagated[result.settings.index(setting), layer]:>9.1%}"
            f"{right[column]:>6}"
            for setting, distance, right in zip(result.finalists, result.distance, result.right, strict=True)
        ]
        print(f"{layer:>5}" + "".join(cells) + (" <" if layer == result.tsp_layer else ""))
    print(f"\nfull context  {result.right_full} of {result.answers} right")
    print(f"chosen        tsp_layer {result.tsp_layer}, {result.setting}: {result.right_chosen} right")
    by = f"eq. 3 with tolerance {result.tolerance:g} would take layer {result.by_distance}"
    print(f"by            {'the answers; ' + by if result.decided_by == 'answers' else by + '; no answers to count'}")
    print(f"prefill       {result.flops_share:.0%} of full context's arithmetic (estimated)")
    if result.seconds is not None:
        full, chosen = result.seconds
        print(f"              {full:.2f} s full, {chosen:.2f} s chosen: {full / chosen:.2f} times faster (measured)")
