"""One pass per sample that branches off after each candidate layer, and an answer from each branch.

layers 0 ... 8 ─┬─ 9 ─┬─ 10 ─┬─ ...            all tokens
                └─ 9  └─ 10  └─ 11 ... 29      a fifth of them, then the answer is decoded
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fastkv_jax.calibration.runs import Run, is_right, last_hidden
from fastkv_jax.calibration.samples import Sample
from fastkv_jax.methods import FastKV


class Trial(NamedTuple):
    """One sample with TSP after one layer."""

    hidden: Float[np.ndarray, " E"]
    right: bool


def trials(run: Run, sample: Sample, method: FastKV, layers: Sequence[int]) -> Iterable[Trial]:
    """The method with each of the (rising) layers as TSP layer: the layers before it are run once for all."""
    on, (before, *rest) = run.begun(sample, method)
    after = rest[0] if rest else before._replace(kept=before.kept[-1:])  # a budget of all makes one stage
    on.enter(before._replace(kept=before.kept[:1]))
    for i in range(layers[-1] + 1):
        on.layers([i])
        if i in layers:
            trial = on.branch()
            trial.enter(after)
            for j in range(i + 1, run.model.config.num_layers):
                trial.layers([j])
            trial.join()
            hidden = np.asarray(last_hidden(run.model, trial.at.x))
            yield Trial(hidden, is_right(run, trial.finish(), sample))


def distance(hidden: Float[np.ndarray, " E"], full: Float[np.ndarray, " E"]) -> float:
    """Eq. 3, normalised as in figure 3."""
    return float(np.square(hidden - full).sum() / np.square(full).sum())
