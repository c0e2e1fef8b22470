"""How close each kernel comes to what this device can do: its bytes against a copy, its FLOPs against a matrix product.

Copy and product are measured in the same run, interleaved with the kernels. Shapes are those of a layer of
Llama-3.1-8B: 32 query heads, 8 KV heads, head size 128.

  benchmark.py kernels --platform gpu
  benchmark.py kernels --tokens 131072 --slots 13184 --rows 8 --json
"""

import argparse
import importlib.metadata
import json
import statistics
from collections.abc import Sequence
from typing import Any

from fastkv_jax.benchmarks.device_rates import Case, rates, timer
from fastkv_jax.cli.flags import common
from fastkv_jax.errors import FastKVConfigError

# Shares of the copy rate; docs/kernels.md.
TARGETS = {"window_scores": 0.85, "decode_attention": 0.75, "linear": 0.75, "projections": 0.75, "gated": 0.8}


def parser() -> common.Parser:
    """All flags, with their ranges."""
    parser = common.Parser(prog="benchmark.py kernels", description=__doc__)
    group = parser.add_argument_group("what to time")
    group.add_argument("--tokens", type=int, nargs="+", metavar="T", help="prompt lengths, >= 128 (default: 32768 and "
                       "131072; on a CPU 8192)")  # fmt: skip
    group.add_argument("--slots", type=int, nargs="+", metavar="C", help="entries of a compressed cache, >= 1 "
                       "(default: 4096 and 13184)")  # fmt: skip
    group.add_argument("--rows", type=int, default=8, metavar="B", help="batch of the decode step, >= 1 (default: 8)")
    group.add_argument("--repeats", type=int, default=5, metavar="N", help="timed rounds, >= 1 (default: 5)")
    group.add_argument("--kernels", choices=("reference", "tpu", "gpu"), help="default: the platform's; CPU: reference")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    common.add_run_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return common.run(_run, parser().parse(argv))


def _run(options: argparse.Namespace) -> int:
    for name, least in (("tokens", 128), ("slots", 1), ("rows", 1), ("repeats", 1)):
        given = getattr(options, name)
        value = min(given) if isinstance(given, list) else given
        if value is not None and value < least:
            raise FastKVConfigError(f"{name} must be >= {least}, got {value}")
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    import jax

    from fastkv_jax.benchmarks.kernel_cases import cases as cases_of
    from fastkv_jax.benchmarks.kernel_cases import has_float8
    from fastkv_jax.cli.asking.report import Reporter

    kernels = options.kernels or ("reference" if platform == "cpu" else platform)
    tokens = options.tokens or ([8192] if platform == "cpu" else [32_768, 131_072])
    say = Reporter(quiet=options.quiet)
    say.header(platform, "float32" if platform == "cpu" else "bfloat16")
    cases = cases_of(platform, kernels, tokens, options.slots or [4096, 13_184], options.rows)
    if not has_float8(platform):
        say.line("left out", "caches of float8_e4m3fn, which this device does not have")
    _time(cases, options.repeats, say)
    found = {
        "device": jax.local_devices()[0].device_kind,
        "jax": importlib.metadata.version("jax"),
        "kernels": kernels,
        **rates(cases[0], cases[1]),
        "rows": [_row(case, cases[0], cases[1]) for case in cases[2:]],
    }
    print(json.dumps(found)) if options.json else _table(found)
    return common.OK


def _time(cases: list[Case], repeats: int, say) -> None:
    """Cases take turns."""
    timers = [timer(case) for case in cases]
    for turn in range(repeats):
        say.line("round", f"{turn + 1} of {repeats}")
        for measure in timers:
            measure()


def _row(case: Case, copy: Case, product: Case) -> dict[str, Any]:
    """Medians, and the shares of what the device can do."""
    seconds, device = statistics.median(case.seconds), rates(copy, product)
    return {
        "op": case.name,
        "shape": case.shape,
        "us": 1e6 * seconds,
        "us_range": [1e6 * min(case.seconds), 1e6 * max(case.seconds)],
        "bytes": case.bytes,
        "flops": case.flops,
        "share_of_copy": case.bytes / seconds / device["copy_bytes_per_s"],
        "share_of_product": case.flops / seconds / device["product_flops_per_s"],
        "target": TARGETS.get(case.name),
    }


def _table(found: dict[str, Any]) -> None:
    print(f"{found['device']}, jax {found['jax']}, kernels: {found['kernels']}; a copy moves "
          f"{found['copy_bytes_per_s'] / 1e9:,.1f} GB/s, a matrix product makes "
          f"{found['product_flops_per_s'] / 1e12:,.3g} TFLOP/s\n")  # fmt: skip
    print("| operation | shape | us (min–max) | GB/s | of the copy | TFLOP/s | of the product | target |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        seconds, (low, high) = row["us"] / 1e6, row["us_range"]
        target = "" if row["target"] is None else f"{row['target']:.0%} of the copy"
        print(f"| {row['op']} | {row['shape']} | {row['us']:,.0f} ({low:,.0f}–{high:,.0f}) "
              f"| {row['bytes'] / seconds / 1e9:,.1f} | {row['share_of_copy']:.0%} "
              f"| {row['flops'] / seconds / 1e12:,.3g} | {row['share_of_product']:.0%} | {target} |")  # fmt: skip
