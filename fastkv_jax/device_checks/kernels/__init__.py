"""Step `kernels`: every kernel on the device against its specification in float32, at the highest precision.

On a CPU the kernels of "gpu" run interpreted, on small shapes.
"""

import itertools
from collections.abc import Iterator

from fastkv_jax.device_checks.kernels import append, decode, linear, prefill, scores
from fastkv_jax.device_checks.results import Check


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """The kernels in turn, each one's most telling case first, so that a step cut short has seen something of all."""
    turns = itertools.zip_longest(*(part.checks(platform, quick) for part in (scores, decode, linear, append, prefill)))
    return (check for turn in turns for check in turn if check is not None)
