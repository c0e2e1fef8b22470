"""How far an evaluation is, by tokens: a bar on a terminal, a line every 30 seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

INTERVAL_S = 30.0


@contextmanager
def progress(tokens: int, report: Callable[[str], object] | None) -> Iterator[Callable[[int], object]]:
    """A function to call with the tokens of each batch that was answered. Nothing is shown if `report` is None."""
    if report is None:
        yield lambda _: None
    elif sys.stderr.isatty():
        with tqdm(total=tokens, desc="answers", unit="tok", unit_scale=True, file=sys.stderr) as bar:
            yield bar.update
    else:
        yield _Lines(tokens, report).advance


class _Lines:
    def __init__(self, tokens: int, report: Callable[[str], object]):
        self._tokens, self._report = tokens, report
        self._done = 0
        self._began = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= INTERVAL_S:
            self._said = now
            left_s = (now - self._began) * (self._tokens - self._done) / max(self._done, 1)
            share = self._done / max(self._tokens, 1)
            self._report(f"{share:.0%} of {self._tokens:,} tokens answered, {tqdm.format_interval(left_s)} left")
