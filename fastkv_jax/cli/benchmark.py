"""Time prefill, decode and both together: methods against full context, and against transformers on PyTorch.

Runs are interleaved (one of each, then again) and medians compared, so that a slow minute hits all alike. Ratios are
what to read: seconds belong to one machine on one day. The limit beside a ratio is what the arithmetic allows: its
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
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastkv_jax.benchmarks import shapes
from fastkv_jax.benchmarks.timing import TRANSFORMERS, Timing
from fastkv_jax.cli.flags import common, settings
from fastkv_jax.errors import FastKVConfigError
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
    group.add_argument("--peer", choices=(TRANSFORMERS,), help="also time transformers' full context (PyTorch, the "
                       "same weights and dtype, sdpa)")  # fmt: skip
    group.add_argument("--no-rates", action="store_true", help="do not measure what the device can do; the table has "
                       "no shares of it then")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
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
    return common.run(_run, parser().parse(words))


def _run(options: argparse.Namespace) -> int:
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
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    _benchmark(options, platform, common.dtype_for(options, platform))
    return common.OK


def _benchmark(options: argparse.Namespace, platform: str, dtype: str) -> None:
    import jax

    from fastkv_jax.benchmarks import speed_report
    from fastkv_jax.benchmarks.device_rates import rates, timer, yardsticks
    from fastkv_jax.benchmarks.race import Series, costs_of, race, timed
    from fastkv_jax.benchmarks.scoring_time import scorer
    from fastkv_jax.cli.asking.report import Reporter
    from fastkv_jax.methods import FullKV, Method
    from fastkv_jax.prefilling.adaptive import Adaptive

    say = Reporter(quiet=options.quiet)
    say.header(platform, dtype)
    name, model, prompts = _model(options, dtype)
    methods: dict[str, Method] = {"full": FullKV()}
    for given in options.methods or [options.method]:
        options.method = given
        preset, method = settings.method(options, name, model.config.num_layers)
        if given != "full":
            say.line("preset", preset.describe(given, method))
            methods[given] = method
    yard = () if options.no_rates else yardsticks(platform)
    measures = [timer(case) for case in yard]
    competitor = _competitor(model) if options.peer else None
    series: list[tuple[Series, Series]] = []  # with full context of the same length
    for tokens in options.tokens:
        tokens_of = prompts(tokens)
        runs: dict[str, Callable[[], Timing]] = {
            known: lambda method=method, given=tokens_of: timed(model, given, method, options.new_tokens)
            for known, method in methods.items()
        }
        if competitor is not None:
            runs[TRANSFORMERS] = lambda given=tokens_of: competitor.time(given, options.new_tokens)
        costs = {known: costs_of(model, method, tokens, options.batch) for known, method in methods.items()}
        mine = {known: Series(known, tokens, *costs.get(known, costs["full"])) for known in runs}
        scorers = {known: scorer(model, method, tokens_of) for known, method in methods.items()
                   if not isinstance(method, FullKV | Adaptive)}  # fmt: skip
        race(runs, mine, scorers, measures, options.repeats, say.line)
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


def _competitor(model) -> Any:
    from fastkv_jax.benchmarks.against_transformers import Competitor

    return Competitor(model)
