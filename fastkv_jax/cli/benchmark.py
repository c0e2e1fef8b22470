"""Time prefill and decode of methods against full context, and optionally against transformers on PyTorch.

Runs are interleaved (one of each, then again) and medians compared, so that a slow minute hits all alike. Ratios are
what to read: seconds belong to one machine on one day.

  benchmark.py --tokens 4096 8000
  benchmark.py --tokens 4096 --against transformers      (needs torch)
  benchmark.py kernels --help                            (each kernel against the device's own copy and product)
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastkv_jax import presets
from fastkv_jax.cli import common, settings
from fastkv_jax.errors import FastKVConfigError

TRANSFORMERS = "transformers"


@dataclass
class Series:
    """Seconds of the repeated runs of one contestant at one length, the warm-up left out."""

    name: str
    tokens: int
    prefill_s: list[float] = field(default_factory=list)
    decode_s_per_token: list[float] = field(default_factory=list)

    def row(self, baseline: "Series") -> dict[str, Any]:
        """Medians, and how many times faster than the baseline they are."""
        prefill, decode = statistics.median(self.prefill_s), statistics.median(self.decode_s_per_token)
        return {
            "tokens": self.tokens,
            "name": self.name,
            "prefill_s": round(prefill, 3),
            "prefill_range_s": [round(min(self.prefill_s), 3), round(max(self.prefill_s), 3)],
            "decode_ms_per_token": round(1e3 * decode, 2),
            "prefill_speedup": round(statistics.median(baseline.prefill_s) / prefill, 2),
            "decode_speedup": round(statistics.median(baseline.decode_s_per_token) / decode, 2),
        }


def parser() -> common.Parser:
    """All flags."""
    parser = common.Parser(prog="benchmark.py", description=__doc__)
    group = common.add_model_flags(parser)
    group.add_argument(
        "--random-weights", action="store_true", help="only the model's shape matters: do not load weights"
    )
    group = parser.add_argument_group("what to time")
    group.add_argument(
        "--tokens", type=int, nargs="+", default=[4096], metavar="N", help="prompt lengths, >= 1 (default: 4096)"
    )
    group.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoded tokens, >= 16 (default: 32)")
    group.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="timed rounds after one warm-up, >= 1 (default: 3)"
    )
    group.add_argument(
        "--against", choices=(TRANSFORMERS,), help="also time transformers' full context (PyTorch, float32, sdpa)"
    )
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    settings.add_method_flags(parser)
    common.add_run_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["kernels"]:
        from fastkv_jax.cli import benchmark_kernels

        return benchmark_kernels.main(words[1:])
    return common.run(_run, parser().parse(words))


def _run(options: argparse.Namespace) -> int:
    rules = (("tokens", min(options.tokens) >= 1, ">= 1"), ("new_tokens", options.new_tokens >= 16, ">= 16"),
             ("repeats", options.repeats >= 1, ">= 1"))  # fmt: skip
    for name, fine, allowed in rules:
        if not fine:
            given = getattr(options, name)
            raise FastKVConfigError(f"{name} must be {allowed}, got {min(given) if name == 'tokens' else given}")
    settings.check(options)
    platform = common.choose_platform(options)
    if not options.no_compile_cache:
        common.use_compile_cache()
    _benchmark(options, platform, common.dtype_for(options, platform))
    return common.OK


def _benchmark(options: argparse.Namespace, platform: str, dtype: str) -> None:
    from fastkv_jax import checkpoint
    from fastkv_jax.cli.report import Reporter
    from fastkv_jax.methods import FullKV

    say = Reporter(quiet=options.quiet)
    say.header(platform, dtype)
    found = checkpoint.resolve(options.model, progress=not options.quiet)
    config = checkpoint.inspect(found)
    longest = max(options.tokens) + options.new_tokens
    if longest > config.max_position_embeddings:
        raise FastKVConfigError(f"tokens {longest - options.new_tokens:,} + {options.new_tokens} new > "
                                f"{config.max_position_embeddings:,} (max_position_embeddings)")  # fmt: skip
    preset, method = settings.method(options, found.name, config.num_layers)
    say.line("preset", preset.describe(options.method, method))
    model = _random(config, dtype) if options.random_weights else checkpoint.load_model(found, dtype)
    contestants: dict[str, Callable[[np.ndarray], tuple[float, float, np.ndarray]]] = {
        "full": lambda prompt: _time(model, prompt, FullKV(), options.new_tokens)
    }
    if options.method != "full":
        contestants[options.method] = lambda prompt: _time(model, prompt, method, options.new_tokens)
    if options.against:
        from fastkv_jax.cli.against_transformers import Competitor

        competitor = Competitor(model)
        contestants[TRANSFORMERS] = lambda prompt: competitor.time(prompt, options.new_tokens)

    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens), dtype=np.int32)
        rows += _race(contestants, prompt, options.repeats, say)
    if options.json:
        print(json.dumps({"model": found.name, "dtype": dtype, "settings": presets.settings(method), "rows": rows}))
    else:
        _table(rows)


def _race(contestants, prompt: np.ndarray, repeats: int, say) -> list[dict[str, Any]]:
    series = {name: Series(name, prompt.shape[1]) for name in contestants}
    for turn in range(repeats + 1):
        logits: dict[str, np.ndarray] = {}
        for name, run in contestants.items():
            prefill, decode, logits[name] = run(prompt)
            say.line("round", f"{turn}{' (warm-up)' if turn == 0 else ''}  {name}  prefill {prefill:.2f} s  "
                     f"decode {1e3 * decode:.1f} ms/token")  # fmt: skip
            if turn:
                series[name].prefill_s.append(prefill)
                series[name].decode_s_per_token.append(decode)
        if turn == 0 and TRANSFORMERS in logits:  # a race between programs that disagree would mean nothing
            say.line(
                "check", f"last-token logits differ by at most {abs(logits['full'] - logits[TRANSFORMERS]).max():.1e}"
            )
    return [entry.row(series["full"]) for entry in series.values()]


def _time(model, prompt: np.ndarray, method, new_tokens: int) -> tuple[float, float, np.ndarray]:
    """(seconds of prefill, seconds per decoded token, last-token logits); the first chunk of decoding is left out."""
    import jax

    from fastkv_jax import buckets, generation, inference

    tokens, start = buckets.pad_batch([prompt[0]])
    began = time.perf_counter()
    result = inference.prefill(model, tokens, start, method=method, max_new_tokens=new_tokens + generation.CHUNK + 1)
    jax.block_until_ready(result)
    prefill = time.perf_counter() - began
    logits = np.asarray(result.logits[0])
    made, began, skipped = 0, 0.0, generation.CHUNK + 1
    for chunk, _ in generation.decode_chunks(model, result, max_new_tokens=new_tokens + skipped, stop_tokens=()):
        made += chunk.shape[1]
        if made == skipped:
            began = time.perf_counter()
    return prefill, (time.perf_counter() - began) / new_tokens, logits


def _random(config, dtype: str):
    import jax
    from flax import nnx

    from fastkv_jax.checkpoint import parse_dtype
    from fastkv_jax.model import Llama

    return jax.block_until_ready(jax.jit(lambda: Llama(config, nnx.Rngs(0), parse_dtype(dtype)))())


def _table(rows: list[dict[str, Any]]) -> None:
    line = "{:>8}  {:<14}{:>10}{:>16}{:>11}{:>11}{:>10}"
    print(line.format("tokens", "name", "prefill s", "(min–max)", "decode ms", "prefill ×", "decode ×"))
    for row in rows:
        low, high = row["prefill_range_s"]
        numbers = (f"{row['prefill_s']:.2f}", f"{low:.2f}–{high:.2f}", f"{row['decode_ms_per_token']:.1f}")
        print(line.format(f"{row['tokens']:,}", row["name"], *numbers, row["prefill_speedup"], row["decode_speedup"]))
    print("× = times faster than full in the same run, medians")
