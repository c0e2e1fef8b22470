"""How a step runs its checks, and what becomes of those that cannot be made."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastkv_jax.device_checks import device, steps
from fastkv_jax.device_checks.results import Check, DoesNotFit, Missing, Outcome, measured, within


def raises(error: Exception) -> Callable[[], Outcome]:
    def run() -> Outcome:
        raise error

    return run


CHECKS = [
    Check("fast", lambda: measured("9 GB/s", rate=9e9)),
    Check("exact", lambda: within(0.1, 0.2)),
    Check("inexact", lambda: within(0.3, 0.2)),
    Check("not a number", lambda: within(float("nan"), 0.2)),
    Check("absent", raises(Missing("no network"))),
    Check("large", raises(DoesNotFit("needs 9.0 GB of 8.0"))),
    Check("broken", raises(ValueError("two\nlines"))),
    Check("last", lambda: within(0.0, 0.2)),
]


@pytest.fixture
def told(monkeypatch) -> Callable[..., list[dict]]:
    monkeypatch.setattr(device, "checks", lambda platform, quick: iter(CHECKS))

    def run(done: int = 0) -> list[dict]:
        lines: list[dict] = []
        steps.run("device", "cpu", True, done, lines.append)
        return lines

    return run


def test_each_check_is_told_when_it_begins_and_what_it_found(told):
    lines = told()
    assert [line["begins"] for line in lines[::2]] == [row["check"] for row in lines[1::2]] == [c.name for c in CHECKS]
    assert [row["status"] for row in lines[1::2]] == [
        "measured", "right", "wrong", "wrong", "missing", "does not fit", "died", "right",
    ]  # fmt: skip
    assert [row["found"] for row in lines[3:9:2]] == ["1.0e-01 of 2.0e-01", "3.0e-01 of 2.0e-01", "nan of 2.0e-01"]
    assert lines[7]["numbers"]["error"] is None and lines[1]["numbers"] == {"rate": 9e9}
    broken = lines[13]
    assert broken["found"] == "ValueError: two lines" and "Traceback" in broken["details"]


def test_it_goes_on_after_the_checks_that_are_done(told):
    assert [line["begins"] for line in told(done=6)[::2]] == ["broken", "last"]


def test_where_the_device_is_gone_after_a_failure_the_process_ends(told, monkeypatch):
    monkeypatch.setattr(steps, "_still_there", raises(RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")))
    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
        told()


def test_a_step_that_lacks_what_all_its_checks_need_is_one_row(monkeypatch):
    def checks(platform: str, quick: bool) -> Iterator[Check]:
        raise Missing("no recordings")
        yield

    monkeypatch.setattr(device, "checks", checks)
    lines: list[dict] = []
    steps.run("device", "cpu", True, 0, lines.append)
    assert [(row["check"], row["status"], row["found"]) for row in lines] == [("", "missing", "no recordings")]


def test_shares_are_seconds_of_the_usual_limits_and_the_last_step_may_take_what_is_left():
    assert sum(step.seconds for step in steps.STEPS) == 720 and sum(step.quick for step in steps.STEPS) == 240
    for quick in (True, False):
        shares = steps.allowances(list(steps.STEPS), quick)
        assert shares[-1] == 1 and all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("step", ["kernels", "selection", "offsets", "recorded"])
def test_checks_have_names_of_their_own(step, platform, quick):
    """They are found by them in a report, and draw their numbers from them."""
    from importlib import import_module

    module = next(s.module for s in steps.STEPS if s.name == step)
    names = [check.name for check in import_module(f"fastkv_jax.device_checks.{module}").checks(platform, quick)]
    assert len(set(names)) == len(names) > 2
    assert not (platform == "tpu" and any("float16," in name.replace("bfloat16", "") for name in names))


def test_the_page_says_the_shares_that_there_are():
    page = (Path(__file__).parents[2] / "docs" / "check_device.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)` \| .* \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert listed == [(step.name, str(step.seconds), str(step.quick)) for step in steps.STEPS]
