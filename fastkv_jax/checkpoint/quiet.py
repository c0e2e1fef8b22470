"""Silence for libraries that log what does not concern the user, or what an error of ours says better."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop log records up to WARNING inside the block. Affects every logger of the process while it lasts."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
