"""What a calibration found, as values."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from fastkv_jax.calibration.rules import Setting
from fastkv_jax.methods import FastKV, presets


@dataclass(frozen=True, eq=False)
class Findings:
    """What was measured, and what was chosen from it. Axes: M settings, F finalists, L layers, C candidate layers.

    Attributes:
        model: its name
        samples: N of them
        digest: the sha256 of the samples
        lengths: [N] tokens of each prompt
        spans: where the answer's tokens stand in each prompt, [first, stop), None where they do not
        tsp_rate: as given
        retention_rate: as given
        tolerance: as given
        layers: C candidates for the TSP layer
        settings: M windows, kernels and poolings
        finalists: the F of them that were tried, best promise first
        propagated: [M, L] share of the answer's own tokens that TSP after this layer would let through, mean over
            samples
        kept_mean: [M, L] share of them that a KV head of this layer would keep of the full context: mean over heads
        kept_best: [M, L] the same of the layer's best head
        overlap: [M, L, L] share of tokens that TSP after one layer and after another would both let through, the window
            apart (figure 1)
        distance: [F, C] ||H - H'||^2 / ||H||^2, H the last token's final hidden state with the full context, H' with
            TSP after this layer, mean over samples (eq. 3, figure 3)
        right: [F, C] answers that came out
        right_full: with the full context
        answers: samples that expect one
        tsp_layer: chosen
        setting: chosen
        by_distance: the layer that eq. 3 with the tolerance takes for that setting
        decided_by: "answers", or "distance" where none came out that could be counted
        flops_share: matrix products and attention of its prefill, share of full context's, mean over samples
        seconds: medians of a full and of the chosen prefill of the longest sample, None unless they were timed
    """

    model: str
    samples: int
    digest: str
    lengths: tuple[int, ...]
    spans: tuple[tuple[int, int] | None, ...]
    tsp_rate: float
    retention_rate: float
    tolerance: float
    layers: tuple[int, ...]
    settings: tuple[Setting, ...]
    finalists: tuple[Setting, ...]
    propagated: Float[np.ndarray, "M L"]
    kept_mean: Float[np.ndarray, "M L"]
    kept_best: Float[np.ndarray, "M L"]
    overlap: Float[np.ndarray, "M L L"]
    distance: Float[np.ndarray, "F C"]
    right: Int[np.ndarray, "F C"]
    right_full: int
    answers: int
    tsp_layer: int
    setting: Setting
    by_distance: int
    decided_by: Literal["answers", "distance"]
    flops_share: float
    seconds: tuple[float, float] | None

    @property
    def right_chosen(self) -> int:
        """Answers that came out with what was chosen."""
        return int(self.right[self.finalists.index(self.setting), self.layers.index(self.tsp_layer)])

    def method(self) -> FastKV:
        """FastKV as chosen."""
        return FastKV(
            tsp_layer=self.tsp_layer, tsp_rate=self.tsp_rate, retention_rate=self.retention_rate,
            **self.setting._asdict(),
        )  # fmt: skip

    def preset(self) -> dict[str, Any]:
        """The `preset:` section of a file in configs/models."""
        return {
            "window_end": "question",
            "tsp_layer": self.tsp_layer,
            "tsp_rate": self.tsp_rate,
            "retention_rate": self.retention_rate,
            **self.setting._asdict(),
            "min_prompt_to_compress": presets.load("default").settings["min_prompt_to_compress"],
        }

    def evidence(self) -> dict[str, Any]:
        """Everything that decided, as plain values."""
        tried = {
            str(setting): {"distance": _rounded(distance), "right": right.tolist()}
            for setting, distance, right in zip(self.finalists, self.distance, self.right, strict=True)
        }
        places = [self.settings.index(setting) for setting in self.finalists]
        for setting, place in zip(self.finalists, places, strict=True):
            tried[str(setting)]["propagated"] = _rounded(self.propagated[place, list(self.layers)])
        seconds = None if self.seconds is None else dict(zip(("full", "chosen"), _rounded(self.seconds), strict=True))
        return {
            "fastkv_jax": _version(),
            "model": self.model,
            "samples": self.samples,
            "samples_sha256": self.digest,
            "tokens": [min(self.lengths), max(self.lengths)],
            "tolerance": self.tolerance,
            "answers": self.answers,
            "right_full": self.right_full,
            "right": self.right_chosen,
            "decided_by": self.decided_by,
            "layer_by_distance": self.by_distance,
            "prefill_flops_share": round(self.flops_share, 3),
            "prefill_seconds": seconds,
            "layers": list(self.layers),
            "finalists": tried,
        }


def _rounded(values: Any) -> list[float | None]:
    """Four significant digits, None for not measured: also JSON has no NaN."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def _version() -> str:
    try:
        return importlib.metadata.version("fastkv-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return "unknown"
