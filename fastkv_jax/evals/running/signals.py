"""SIGTERM and Ctrl-C wait for the end of a batch; a second one does not wait."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastkv_jax.errors import Terminated

MEANS: dict[int, type[BaseException]] = {signal.SIGTERM: Terminated, signal.SIGINT: KeyboardInterrupt}


@contextmanager
def deferred_signals() -> Iterator[Callable[[], None]]:
    """A function to call between batches: raises `Terminated` or `KeyboardInterrupt` if the signal came before."""
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        if came:
            raise MEANS[number]
        came.append(number)

    def stop() -> None:
        if came:
            raise MEANS[came[0]]

    before = {number: signal.signal(number, handle) for number in MEANS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
