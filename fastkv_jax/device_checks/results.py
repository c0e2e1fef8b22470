"""What a check is, and what it finds: a row of the table and of the report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RIGHT, WRONG, DIED, MEASURED = "right", "wrong", "died", "measured"
MISSING, TOO_LARGE, LATE = "missing", "does not fit", "no time left"
FAULTS, GAPS = (WRONG, DIED), (MISSING, TOO_LARGE, LATE)


class Outcome(NamedTuple):
    """Of one check."""

    status: str
    found: str  # for people
    numbers: dict[str, Any]  # for machines


class Check(NamedTuple):
    """A name, and what to run."""

    name: str
    run: Callable[[], Outcome]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    step: str
    check: str  # "": the step as a whole
    status: str
    found: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    details: str = ""  # what a traceback or stderr said; for the report alone


class Missing(Exception):
    """What a check needs is not here; the message says what and why."""


class DoesNotFit(Exception):
    """The device has less memory than a check needs."""


def within(error: float, tolerance: float, note: str = "", **numbers: Any) -> Outcome:
    """Right if the error, which may be NaN or infinite, is no larger than the tolerance."""
    found = f"{error:.1e} of {tolerance:.1e}{note and f', {note}'}"
    finite = error if abs(error) < float("inf") else None  # JSON has no other number
    return Outcome(RIGHT if error <= tolerance else WRONG, found, {"error": finite, "tolerance": tolerance, **numbers})


def equal(differing: int, of: int, what: str, **numbers: Any) -> Outcome:
    """Right if nothing differs."""
    found = f"{of:,} {what} equal" if not differing else f"{differing:,} of {of:,} {what} differ"
    return Outcome(WRONG if differing else RIGHT, found, {"differing": differing, "of": of, **numbers})


def measured(found: str, **numbers: Any) -> Outcome:
    """A number that nothing is said against."""
    return Outcome(MEASURED, found, numbers)
