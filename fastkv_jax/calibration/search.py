"""What a calibration searches and measures: its options, with defaults, checked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypedDict

import numpy as np

from fastkv_jax.calibration.rules import Setting
from fastkv_jax.calibration.samples import Sample
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.methods import FastKV
from fastkv_jax.methods.budgets import check_int
from fastkv_jax.model.platforms import Platform


class CalibrationOptions(TypedDict, total=False):
    """How `calibrate` searches.

    Attributes:
        name: of the model, for the report (default: "")
        layers: candidates for the TSP layer, the last one being the paper's L_max (default: None, a quarter of the
            model to three quarters)
        window_sizes: to survey, with all kernel sizes and poolings (default: (8, 16, 32))
        kernel_sizes: likewise (default: (7, 13, 21, 31))
        poolings: likewise (default: ("max",))
        tsp_rate: as in `FastKV`; given, not searched: it says what the user wants to save (default: 0.2)
        retention_rate: likewise (default: 0.2)
        tolerance: how much larger than the smallest a distance may be to count as close, >= 0 (eq. 3; default: 0.1)
        finalists: how many of the settings are tried in earnest, those that promise most (default: 3)
        max_new_tokens: tokens decoded to look for the answer in (default: 24)
        tokenizer: to compare answers as text (default: None, token ids are compared, which a space before the answer
            may change)
        timed: also time the prefill, full and chosen in turns (default: False)
        platform: "cpu", "gpu" or "tpu" (default: None, where the weights are)
        progress: called with (steps done, steps in all) (default: nobody is told)
    """

    name: str
    layers: Iterable[int] | None
    window_sizes: Iterable[int]
    kernel_sizes: Iterable[int]
    poolings: Iterable[str]
    tsp_rate: float
    retention_rate: float
    tolerance: float
    finalists: int
    max_new_tokens: int
    tokenizer: Any
    timed: bool
    platform: Platform | None
    progress: Callable[[int, int], object]


@dataclass(frozen=True)
class Search:
    """`CalibrationOptions` with their defaults."""

    name: str = ""
    layers: Iterable[int] | None = None
    window_sizes: Iterable[int] = (8, 16, 32)
    kernel_sizes: Iterable[int] = (7, 13, 21, 31)
    poolings: Iterable[str] = ("max",)
    tsp_rate: float = 0.2
    retention_rate: float = 0.2
    tolerance: float = 0.1
    finalists: int = 3
    max_new_tokens: int = 24
    tokenizer: Any = None
    timed: bool = False
    platform: Platform | None = None
    progress: Callable[[int, int], object] = lambda done, total: None

    def settings(self) -> tuple[Setting, ...]:
        """All combinations, the cheapest first."""
        grid = dict.fromkeys(Setting(*one) for one in product(self.window_sizes, self.kernel_sizes, self.poolings))
        return tuple(sorted(grid, key=lambda setting: setting.cost))

    def candidates(self, num_layers: int) -> tuple[int, ...]:
        """Layers to try TSP after, rising."""
        return _middle(num_layers) if self.layers is None else tuple(sorted(set(self.layers)))

    def method(self, setting: Setting, layer: int) -> FastKV:
        """FastKV at a layer."""
        rates = {"tsp_rate": self.tsp_rate, "retention_rate": self.retention_rate}
        return FastKV(tsp_layer=layer, **rates, **setting._asdict())

    def check(
        self, settings: Sequence[Setting], candidates: Sequence[int], samples: Sequence[Sample], num_layers: int
    ) -> None:
        """Raise `FastKVConfigError` or `InputError` for what cannot be searched."""
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < np.inf:  # NaN fails too
            raise FastKVConfigError(f"tolerance must be >= 0, got {self.tolerance!r}")
        check_int("finalists", self.finalists, 1)
        check_int("max_new_tokens", self.max_new_tokens, 1)
        _check_candidates(settings, candidates, samples, num_layers)


def _middle(num_layers: int) -> tuple[int, ...]:
    """From a quarter of the model to three quarters, as far as layers follow."""
    first = num_layers // 4
    return tuple(range(first, max(first, min(3 * num_layers // 4, num_layers - 2)) + 1))


def _check_candidates(
    settings: Sequence[Setting], candidates: Sequence[int], samples: Sequence[Sample], num_layers: int
) -> None:
    for name, values in (("samples", samples), ("window_sizes, kernel_sizes and poolings", settings),
                         ("layers", candidates)):  # fmt: skip
        if not values:
            raise FastKVConfigError(f"{name} must hold at least one each, got none")
    for layer in candidates:
        FastKV(tsp_layer=layer).check(num_layers)
    if len(settings) > 1 and not any(sample.span for sample in samples):
        found = "no sample has an answer" if not any(s.answer for s in samples) else "no answer stands in its prompt"
        raise InputError(f"{found}: {len(settings)} settings cannot be compared, give one window and one kernel")
