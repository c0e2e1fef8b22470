"""Is my accelerator right, and how fast is it? Every kernel, recorded runs, a real answer, and speeds, step by step.

Each step is a process of its own: one that dies or takes too long is a line of the table, and the others still run.
Exit code 1 if a number is wrong or a step died, else 0; docs/check_device.md says how to read the table.

  check_device.py --platform gpu --quick
  check_device.py --platform gpu --limit 570 --output report.json
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fastkv_jax.cli.check_device import report, supervising
from fastkv_jax.cli.flags import common
from fastkv_jax.device_checks.results import FAULTS, LATE, Row
from fastkv_jax.device_checks.steps import STEPS, Step, allowances
from fastkv_jax.errors import BackendError, FastKVConfigError

LIMITS = {"whole": 720, "quick": 240, "cpu": 3600}  # seconds: an accelerator is paid for, and a CPU interprets
LEAST = 3.0  # seconds: Python and jax alone take as long to start


def parser() -> common.Parser:
    """All flags, with their ranges."""
    parser = common.Parser(prog="check_device.py", description=__doc__)
    names = [step.name for step in STEPS]
    group = parser.add_argument_group("what to check")
    group.add_argument("--quick", action="store_true", help="fewer shapes, no model of 8B parameters")
    group.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP", help="only these: "
                       f"{', '.join(names)} (default: all)")  # fmt: skip
    group.add_argument("--limit", type=float, metavar="SECONDS", help="for everything, > 0: the report is there by "
                       f"then (default: {LIMITS['whole']}, with --quick {LIMITS['quick']}; with --platform cpu "
                       f"{LIMITS['cpu']})")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    group.add_argument("--output", metavar="FILE", help="also write the JSON there, anew after each step")
    common.add_run_flags(parser)
    parser.add_argument("--inside", metavar="STEP", choices=names, help=argparse.SUPPRESS)  # this is a step's process
    parser.add_argument("--done", type=int, default=0, help=argparse.SUPPRESS)  # checks of it that ran before it died
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return common.run(_run, parser().parse(argv))


def _run(options: argparse.Namespace) -> int:
    if options.inside is not None:
        return _inside(options)
    usual = LIMITS["cpu" if options.platform == "cpu" else "quick" if options.quick else "whole"]
    limit = usual if options.limit is None else options.limit
    if not (limit > 0 and math.isfinite(limit)):
        raise FastKVConfigError(f"limit must be finite and > 0, got {limit}")
    out = report.Report(options.output, quick=options.quick, as_json=options.json, quiet=options.quiet)
    with supervising.terminable(), out:
        for row in _rows(options, limit, out):
            out.add(row)
            if row.numbers.get("exit_code") == common.DEVICE and not out.answered:
                raise BackendError(row.found)
    return common.FAILED if out.count(*FAULTS) else common.OK


def _rows(options: argparse.Namespace, limit: float, out: "report.Report") -> Iterator[Row]:
    """Of every step, in their order; each may take its share of the time that is left."""
    steps = [step for step in STEPS if step.name in options.steps]
    clock = supervising.Clock(limit)
    for step, share in zip(steps, allowances(steps, options.quick), strict=True):
        allowed = share * clock.left()
        with out.step(step.name):
            if allowed < LEAST:
                yield Row(step.name, "", LATE, f"{allowed:.1f} s of {limit:,.0f} would be its share")
            else:
                yield from supervising.rows(step.name, _words(options, step), allowed, verbose=options.verbose)


def _words(options: argparse.Namespace, step: Step) -> list[str]:
    """The command for the process of a step."""
    words = ["check_device", "--platform", options.platform, "--inside", step.name]
    for flag in ("quick", "verbose", "debug", "no_compile_cache"):
        words += [f"--{flag.replace('_', '-')}"] * getattr(options, flag)
    return words + ([] if options.mem_fraction is None else ["--mem-fraction", str(options.mem_fraction)])


def _inside(options: argparse.Namespace) -> int:
    """A step's process: its rows are JSON lines on stdout, and whatever else would be printed there is not."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(line: dict[str, Any]) -> None:
        out.write(json.dumps(line, allow_nan=False) + "\n")
        out.flush()

    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    from fastkv_jax.device_checks.steps import run

    run(options.inside, platform, options.quick, options.done, tell)
    return common.OK
