"""Step `kernel-speed`: each kernel in the shape of a layer of Llama-3.1-8B, as shares of what the device can do."""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

from fastkv_jax.benchmarks.device_rates import Case
from fastkv_jax.benchmarks.kernel_cases import FLOAT8, cases
from fastkv_jax.device_checks.device import need
from fastkv_jax.device_checks.kernels.inputs import check_float8
from fastkv_jax.device_checks.results import Check, DoesNotFit, Outcome, measured
from fastkv_jax.device_checks.speed import device, time_case
from fastkv_jax.model.platforms import KERNELS

ARRAYS = 11e9  # bytes of all cases' arrays, and of the two that the rates are measured with


def checks(platform: Any, quick: bool) -> Iterator[Check]:
    """The platform's kernels: on a CPU the references, on the shortest of prompts."""
    tokens, slots, rows = ([256], [128], 1) if platform == "cpu" else ([32_768, 131_072], [4096, 13_184], 8)
    if quick:
        tokens, slots = tokens[:1], slots[:1]
    try:
        need(0 if platform == "cpu" else ARRAYS)
    except DoesNotFit as reason:
        yield Check("all kernels", partial(_raise, reason))
        return
    for case in cases(platform, KERNELS[platform], tokens, slots, rows)[2:]:  # the first are the yardsticks
        yield Check(f"{case.name} {case.shape}", partial(_time, case, platform, 1 if platform == "cpu" else 3))


def _raise(reason: Exception) -> Outcome:
    raise reason


def _time(case: Case, platform: Any, repeats: int) -> Outcome:
    if FLOAT8 in case.shape:
        check_float8(platform)
    able = device(platform)
    time_case(case, repeats)
    seconds = statistics.median(case.seconds)
    of_copy = case.bytes / seconds / able["copy_bytes_per_s"]
    of_product = case.flops / seconds / able["product_flops_per_s"]
    found = (f"{1e6 * seconds:,.1f} us, {case.bytes / seconds / 1e9:,.1f} GB/s, {of_copy:.0%} of the copy, "
             f"{of_product:.0%} of the product")  # fmt: skip
    return measured(found, seconds=seconds, range_s=[min(case.seconds), max(case.seconds)], bytes=case.bytes,
                    flops=case.flops, share_of_copy=of_copy, share_of_product=of_product)  # fmt: skip
