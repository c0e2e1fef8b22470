"""The rules that choose: what is worth trying, and what is taken of what was tried."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SLACK = 0.02  # shares of the answers that are as good as each other


class Setting(NamedTuple):
    """How tokens are judged. Of two that do as well, the smaller kernel is taken, then the smaller window."""

    window_size: int
    kernel_size: int
    pooling: str

    @property
    def cost(self) -> tuple[int, int, str]:
        """What to sort by."""
        return self.kernel_size, self.window_size, self.pooling

    def __str__(self) -> str:
        return f"window {self.window_size} kernel {self.kernel_size}" + ("" if self.pooling == "max" else " avg")


def most_promising(
    propagated: Float[np.ndarray, "M L"], kept_best: Float[np.ndarray, "M L"], layers: Sequence[int]
) -> list[int]:
    """Places of the settings, best first: the answer must pass TSP, and some head of the later layers must hold it.

    Promise: the product of the two shares, averaged over the candidate layers. Differences below a hundredth do not
    count; the settings come cheapest first, and the cheaper one goes before.
    """
    later = np.stack([kept_best[:, layer + 1 :].mean(axis=1) for layer in layers], axis=1)
    promise = (propagated[:, list(layers)] * later).mean(axis=1)
    return [int(place) for place in np.argsort(-np.round(promise, 2), kind="stable")]


def earliest_close(layers: Sequence[int], distance: Float[np.ndarray, " layers"], tolerance: float) -> int:
    """The earliest of the (rising) layers whose distance is at most (1 + tolerance) times the smallest.

    Source: arXiv 2502.01068v7, eq. 3, which takes the smallest itself. Distance falls with depth, so that this is
    nearly always the last layer allowed and saves the least; the tolerance is what makes the rule choose.
    """
    close = np.asarray(distance) <= (1 + tolerance) * np.min(distance)
    return layers[int(np.argmax(close))]


def best_answering(
    layers: Sequence[int],
    settings: Sequence[Setting],
    right: Int[np.ndarray, "F C"],
    wanted: int,
    propagated: Float[np.ndarray, "F C"],
) -> tuple[int, Setting]:
    """The earliest layer, then the cheapest setting, that answers at least `wanted`; where none does, the most.

    Of those, only such as let as much of the answers through TSP as any of them, up to `SLACK`: a right answer of which
    half was cut is luck, and a few samples cannot tell luck from merit.
    """
    enough = right >= min(wanted, right.max())
    shares = np.nan_to_num(propagated, nan=1.0)
    enough &= shares >= shares[enough].max() - SLACK
    column = int(np.argmax(enough.any(axis=0)))
    able = [setting for setting, fine in zip(settings, enough[:, column], strict=True) if fine]
    return layers[column], min(able, key=lambda setting: setting.cost)
