"""The steps in their order, and how one of them runs. Knows no jax until a step runs."""

import importlib
import itertools
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from fastkv_jax.device_checks.results import DIED, MISSING, TOO_LARGE, Check, DoesNotFit, Missing, Row


class Step(NamedTuple):
    """`seconds` and `quick`: its share of the time there is; they are seconds if the limit is the usual one."""

    name: str
    module: str
    seconds: int
    quick: int
    brief: bool = False  # on a CPU its programs compile for longer than they run


STEPS = (  # the first one finds files and a driver that nobody has read yet
    Step("device", "device", 60, 35),
    Step("kernels", "kernels", 180, 70, brief=True),
    Step("offsets", "offsets", 60, 20, brief=True),
    Step("selection", "kernels.selection", 25, 15, brief=True),
    Step("recorded", "recorded", 70, 25, brief=True),
    Step("answer", "answer", 60, 25),
    Step("rates", "speed", 25, 15),
    Step("kernel-speed", "kernel_speed", 70, 20),
    Step("model-speed", "model_speed", 170, 15, brief=True),
)


def allowances(steps: list[Step], quick: bool) -> list[float]:
    """Of the time that is left before each step, the share it may take; what one does not use is for those after it."""
    shares = [step.quick if quick else step.seconds for step in steps]
    return [share / sum(shares[i:]) for i, share in enumerate(shares)]


def run(name: str, platform: str, quick: bool, done: int, tell: Callable[[dict[str, Any]], object]) -> None:
    """Run a step's checks but for the first `done`; `tell` hears of each when it begins, then its row.

    Raises what the device says if it does not answer after a check that failed: whoever started the step goes on anew.
    """
    step = next(step for step in STEPS if step.name == name)
    module = importlib.import_module(f"fastkv_jax.device_checks.{step.module}")
    if step.brief and quick and platform == "cpu":
        _compile_quickly()
    try:
        for check in itertools.islice(module.checks(platform, quick), done, None):
            tell({"begins": check.name})
            row = _row(name, check)
            tell(asdict(row))
            if row.status == DIED:
                _still_there()
    except Missing as reason:
        tell(asdict(Row(name, "", MISSING, str(reason))))


def _row(step: str, check: Check) -> Row:
    began = time.perf_counter()
    details = ""
    try:
        status, found, numbers = check.run()
    except Missing as reason:
        status, found, numbers = MISSING, str(reason), {}
    except DoesNotFit as reason:
        status, found, numbers = TOO_LARGE, str(reason), {}
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        status, found, numbers = DIED, f"{type(error).__name__}: {said}", {}
        details = traceback.format_exc()[-4000:]
    return Row(step, check.name, status, found, numbers, time.perf_counter() - began, details)


def _compile_quickly() -> None:
    import jax

    jax.config.update("jax_disable_most_optimizations", True)


def _still_there() -> None:
    """After an illegal access nothing more runs in this process."""
    import jax.numpy as jnp

    jnp.ones(8).sum().block_until_ready()
