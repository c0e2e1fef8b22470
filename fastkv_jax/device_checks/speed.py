"""Step `rates`: what the device can do, a copy and a matrix product. And how any case is timed."""

import statistics
from collections.abc import Iterator
from functools import cache
from typing import Any

from fastkv_jax.benchmarks.device_rates import Case, rates, timer, yardsticks
from fastkv_jax.device_checks.results import Check, Missing, Outcome, measured

MOST_AGAIN = 6  # measurements


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """One, of two numbers."""
    yield Check("copy and product", lambda: _rates(platform))


def _rates(platform: str) -> Outcome:
    found = device(platform)
    copy, product = found["copy_bytes_per_s"], found["product_flops_per_s"]
    return measured(f"a copy moves {copy / 1e9:,.1f} GB/s, a product makes {product / 1e12:,.3g} TFLOP/s", **found)


@cache
def device(platform: Any) -> dict[str, float]:
    """Bytes and operations a second, measured once in this process."""
    copy, product = yardsticks(platform)
    for case in (copy, product):
        time_case(case, 1 if platform == "cpu" else 3)  # which takes a CPU seconds
    return rates(copy, product)


def time_case(case: Case, repeats: int) -> None:
    """Add measurements to a case: more of them where other programs disturb so much that they come out negative."""
    measure = timer(case)
    while len(case.seconds) < repeats or statistics.median(case.seconds) <= 0:
        if len(case.seconds) == repeats + MOST_AGAIN:
            raise Missing("this machine is too busy for times to mean anything")
        measure()
