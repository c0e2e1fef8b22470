"""Time prefill, decode and both together: methods against full context, and against transformers on PyTorch.

Runs are interleaved (one of each, then again) and medians compared, so that a slow minute hits all alike; only
transformers runs afterwards, in a process of its own that has the device alone. Ratios are what to read: seconds belong
to one machine on one day. The limit beside a ratio is what the arithmetic allows: its
operations for prefill, its bytes for decode. What the device can do is measured in the same run, with a matrix product
and a copy.

  benchmark.py --tokens 4096 8000 --new-tokens 128 --peer transformers      (needs torch)
  benchmark.py --methods full fastkv snapkv --tokens 4096 --output speed/
  benchmark.py --platform gpu --random-weights llama-3.1-8b --tokens 32768 131072
  benchmark.py kernels --help                            (each kernel against the device's own copy and product)
  benchmark.py command --help                            (from the command to the first token, and peak memory)
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastkv_jax.benchmarks import shapes
from fastkv_jax.cli.flags import common, settings
from fastkv_jax.errors import BackendError, FastKVConfigError
from fastkv_jax.methods import presets


def parser() -> common.Parser:
    """All flags."""
    parser = common.Parser(prog="benchmark.py", description=__doc__)
    group = common.add_model_flags(parser)
    group.add_argument("--random-weights", choices=tuple(shapes.MODELS), metavar="NAME", help="no checkpoint: weights "
                       f"drawn at random, in the shape of {', '.join(shapes.MODELS)}")  # fmt: skip
    group = parser.add_argument_group("what to time")
    group.add_argument(
        "--tokens", type=int, nargs="+", default=[4096], metavar="N", help="prompt lengths, >= 1 (default: 4096)"
    )
    group.add_argument("--batch", type=int, default=1, metavar="B", help="prompts at once, >= 1 (default: 1)")
    group.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoded tokens, >= 16 (default: 32)")
    group.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="timed rounds after one warm-up, >= 1 (default: 3)"
    )
    group.add_argument("--methods", nargs="+", metavar="METHOD", help="with the preset's settings and those given, "
                       "beside full context (default: the one of --method)")  # fmt: skip
    group.add_argument("--peer", choices=("transformers",), help="also time transformers' full context (PyTorch, the "
                       "same weights, but random ones are its own; the same dtype, sdpa)")  # fmt: skip
    group.add_argument("--no-rates", action="store_true", help="do not measure what the device can do; the table has "
                       "no shares of it then")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    group.add_argument("--hand-over", metavar="FOLDER", help=argparse.SUPPRESS)  # ours, for a peer that comes after
    group.add_argument("--output", metavar="FOLDER", help="also write speed.json, speed.md and speed.png there")
    group.add_argument("--profile", metavar="FOLDER", help="write one more run of each as a trace that Perfetto and "
                       "TensorBoard show")  # fmt: skip
    settings.add_method_flags(parser)
    common.add_run_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["kernels"]:
        from fastkv_jax.cli import benchmark_kernels

        return benchmark_kernels.main(words[1:])
    if words[:1] == ["command"]:
        from fastkv_jax.cli import benchmark_command

        return benchmark_command.main(words[1:])
    options = parser().parse(words)
    if options.peer and options.hand_over is None:
        return common.run(partial(_with_peer, words), options)
    return common.run(_run, options)


def _check(options: argparse.Namespace) -> None:
    for name, least in (("tokens", 1), ("batch", 1), ("new_tokens", 16), ("repeats", 1)):
        given = getattr(options, name)
        value = min(given) if isinstance(given, list) else given
        if value < least:
            raise FastKVConfigError(f"{name} must be >= {least}, got {value}")
    for name in options.methods or ():
        presets.check_method(name)
    settings.check(options)
    if options.output is not None:
        from fastkv_jax.evals.records import folder

        folder.writable(options.output)


def _with_peer(words: list[str], options: argparse.Namespace) -> int:
    """Ours in one process, transformers in the next: while one has the device, the other does not live."""
    from fastkv_jax.benchmarks import against_transformers as peer
    from fastkv_jax.cli.asking.report import Reporter

    _check(options)
    peer.check_torch()
    say = Reporter(quiet=options.quiet)
    with tempfile.TemporaryDirectory() as scratch:
        ours = [sys.executable, "-m", "fastkv_jax", "benchmark", *words, "--hand-over", scratch]
        done = subprocess.run(ours, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode  # it has said why
        theirs = peer.wait_for_peer(Path(scratch))
        apart = peer.apart(Path(scratch))
    if apart is not None:  # a race between programs that disagree would mean nothing
        say.line("check", f"last-token logits differ by at most {apart:.1e}")
    _show(options, peer.with_rows(json.loads(done.stdout.splitlines()[-1]), theirs))
    for row in theirs:
        if "error" in row:
            raise BackendError(f"--peer transformers, {row['tokens']:,} tokens: {row['error']}")
    return common.OK


def _run(options: argparse.Namespace) -> int:
    _check(options)
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    _benchmark(options, platform, common.dtype_for(options, platform))
    return common.OK


def _benchmark(options: argparse.Namespace, platform: str, dtype: str) -> None:
    import jax

    from fastkv_jax.benchmarks import against_transformers as peer
    from fastkv_jax.benchmarks.device_rates import rates, timer, yardsticks
    from fastkv_jax.benchmarks.race import Series, Timing, costs_of, race, timed
    from fastkv_jax.benchmarks.scoring_time import scorer
    from fastkv_jax.cli.asking.report import Reporter
    from fastkv_jax.methods import FullKV, Method
    from fastkv_jax.prefilling.adaptive import Adaptive

    say = Reporter(quiet=options.quiet)
    say.header(platform, dtype)
    name, model, prompts = _model(options, dtype)
    say.attention(platform, dtype, model.config.head_dim)
    methods: dict[str, Method] = {"full": FullKV()}
    for asked in options.methods or [options.method]:
        options.method = asked
        preset, method = settings.method(options, name, model.config.num_layers)
        if asked != "full":
            say.line("preset", preset.describe(asked, method))
            methods[asked] = method
    yard = () if options.no_rates else yardsticks(platform)
    measures = [timer(case) for case in yard]
    given = {tokens: prompts(tokens) for tokens in options.tokens}
    if options.hand_over is not None:
        peer.hand_over(Path(options.hand_over), model, given, weights=not options.random_weights,
                       new_tokens=options.new_tokens, repeats=options.repeats, quiet=options.quiet)  # fmt: skip
    logits: dict[int, np.ndarray] = {}  # of full context, for each length
    series: list[tuple[Series, Series]] = []  # with full context of the same length
    for tokens, tokens_of in given.items():
        runs: dict[str, Callable[[], Timing]] = {
            known: lambda method=method, tokens_of=tokens_of: timed(model, tokens_of, method, options.new_tokens)
            for known, method in methods.items()
        }
        costs = {known: costs_of(model, method, tokens, options.batch) for known, method in methods.items()}
        mine = {known: Series(known, tokens, *costs[known]) for known in runs}
        scorers = {known: scorer(model, method, tokens_of) for known, method in methods.items()
                   if not isinstance(method, FullKV | Adaptive)}  # fmt: skip
        logits[tokens] = race(runs, mine, scorers, measures, options.repeats, say.line)["full"]
        series += [(entry, mine["full"]) for entry in mine.values()]
        if options.profile is not None:
            with jax.profiler.trace(options.profile, create_perfetto_trace=True):
                for known, run in runs.items():
                    with jax.profiler.TraceAnnotation(f"{known}, {tokens} tokens"):
                        run()
    device = rates(*yard) if yard else {}
    found = {
        "device": jax.local_devices()[0].device_kind, **device,
        "jax": jax.__version__, "model": name, "dtype": dtype, "batch": options.batch,
        "new_tokens": options.new_tokens, "repeats": options.repeats,
        "settings": {known: presets.settings(method) for known, method in methods.items()},
        "rows": [entry.row(full, device) for entry, full in series],
    }  # fmt: skip
    if options.hand_over is None:
        _show(options, found)
    else:
        peer.leave_logits(Path(options.hand_over), logits)
        print(json.dumps(found))


def _show(options: argparse.Namespace, found: dict[str, Any]) -> None:
    from fastkv_jax.benchmarks import speed_report

    print(json.dumps(found) if options.json else speed_report.as_markdown(found))
    if options.output is not None:
        speed_report.write(found, options.output)


def _model(options: argparse.Namespace, dtype: str) -> tuple[str, Any, Callable[[int], np.ndarray]]:
    """Name, model, and prompts [B, n] of a length: of our chronicle, or drawn at random where there is no tokenizer."""
    from fastkv_jax import checkpoint, text
    from fastkv_jax.evals.texts.documents import document

    longest = max(options.tokens) + options.new_tokens
    if options.random_weights:
        config = shapes.config(options.random_weights, 2 * longest)
        drawn = np.random.default_rng(0)

        def random_prompts(n: int) -> np.ndarray:
            return drawn.integers(0, config.vocab_size, (options.batch, n), dtype=np.int32)

        return options.random_weights, _random(config, dtype), random_prompts
    found = checkpoint.resolve(options.model, tokenizer=options.tokenizer, progress=not options.quiet)
    config = checkpoint.inspect(found)
    if longest > config.max_position_embeddings:
        raise FastKVConfigError(f"tokens {longest - options.new_tokens:,} + {options.new_tokens} new > "
                                f"{config.max_position_embeddings:,} (max_position_embeddings)")  # fmt: skip
    tokenizer = text.load_tokenizer(found)

    def prompts(n: int) -> np.ndarray:
        rows = [text.continue_with(tokenizer, document(2 * n, seed))[:n] for seed in range(options.batch)]
        return np.array(rows, np.int32)

    return found.name, checkpoint.load_model(found, dtype), prompts


def _random(config, dtype: str):
    import jax
    from flax import nnx

    from fastkv_jax.checkpoint import parse_dtype
    from fastkv_jax.model.llama import Llama

    return jax.block_until_ready(jax.jit(lambda: Llama(config, nnx.Rngs(0), parse_dtype(dtype)))())
