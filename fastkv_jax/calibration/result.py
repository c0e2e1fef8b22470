"""What a calibration found: curves and counts, the rules that choose from them, a preset to use, a picture to read."""

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from jaxtyping import Float, Int

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.files import check_target, replacing
from fastkv_jax.methods import FastKV, presets

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


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured, and what was chosen from it. Axes: M settings, F finalists, L layers, C candidate layers.

    model         its name; samples N of them; digest the sha256 of the samples
    lengths       [N] tokens of each prompt
    spans         where the answer's tokens stand in each prompt, [first, stop), None where they do not
    settings      M windows, kernels and poolings; finalists: the F of them that were tried, best promise first
    layers        C candidates for the TSP layer
    propagated    [M, L] share of the answer's own tokens that TSP after this layer would let through, mean over samples
    kept_mean     [M, L] share of them that a KV head of this layer would keep of the full context: mean over heads
    kept_best     [M, L] the same of the layer's best head
    overlap       [M, L, L] share of tokens that TSP after one layer and after another would both let through, the
                  window apart (figure 1)
    distance      [F, C] ||H - H'||^2 / ||H||^2, H the last token's final hidden state with the full context, H' with
                  TSP after this layer, mean over samples (eq. 3, figure 3)
    right         [F, C] answers that came out; right_full with the full context; answers: samples that expect one
    tsp_layer, setting: chosen; by_distance: the layer that eq. 3 with the tolerance takes for that setting
    decided_by    "answers", or "distance" where none came out that could be counted
    flops_share   matrix products and attention of its prefill, share of full context's, mean over samples
    seconds       medians of a full and of the chosen prefill of the longest sample, None unless they were timed
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a preset (.yaml) that `--preset` takes, with the evidence beside it. The file is complete or absent."""
        check_path(path, ".yaml")
        rows = [
            f"{self.model or 'A model'}: {self.right_chosen} of {self.answers} answers right, full context "
            f"{self.right_full}; {self.flops_share:.0%} of the prefill's arithmetic.",
            "Found by scripts/calibrate_tsp.py; the numbers that decided are below.",
        ]
        content = {"source": {"model": self.model}, "preset": self.preset(), "calibration": self.evidence()}
        text = "".join(f"# {row}\n" for row in rows) + yaml.dump(content, Dumper=_Lines, sort_keys=False, width=120)
        with replacing(path) as scratch:
            scratch.write_text(text, encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves (.png, needs matplotlib). The file is complete or absent."""
        check_path(path, ".png")
        try:
            import matplotlib.style
        except ImportError as error:
            raise FastKVConfigError("a .png needs matplotlib: pip install 'fastkv-jax[explain]'") from error
        style = {"font.size": 9, "axes.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK}
        style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), QUIET)
        with matplotlib.style.context(["default", style]), replacing(path) as scratch:
            scratch.write_bytes(_draw(self))


def check_path(path: str | os.PathLike[str], suffix: str) -> Path:
    """The path, or `FastKVConfigError` for another suffix, `InputError` for a bad place."""
    if Path(path).suffix.lower() != suffix:
        raise FastKVConfigError(f"cannot write {path}: its name must end in {suffix}")
    return check_target(path)


class _Lines(yaml.SafeDumper):
    """One line for a list of numbers, as people would write it."""


_Lines.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def _rounded(values: Any) -> list[float | None]:
    """Four significant digits, None for not measured: also JSON has no NaN."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def _version() -> str:
    try:
        return importlib.metadata.version("fastkv-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------

DPI, COLOURS = 120, 128
INK, QUIET, PALE = "#1c2430", "#5b6675", "#d5dbe3"
LINES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#56b4e9", "v"))  # Okabe and Ito's
SHADES = "Blues"


def _draw(found: Calibration) -> bytes:
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    from PIL import Image

    figure = Figure((13.5, 8.2), dpi=DPI, facecolor="white")
    panels = figure.subplots(2, 3, gridspec_kw={"left": 0.05, "right": 0.965, "bottom": 0.075, "top": 0.855,
                                               "wspace": 0.26, "hspace": 0.38})  # fmt: skip
    answers, distances, overlap, by_layer, by_setting, heads = panels.flat
    _answers(answers, found)
    _distances(distances, found)
    _overlap(figure, overlap, found)
    _survival(by_layer, found)
    _grid(by_setting, found)
    _heads(heads, found)
    for panel in (answers, distances, by_layer, heads):
        panel.axvline(found.tsp_layer, color=PALE, linewidth=6, zorder=0)
        panel.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(length=3, width=0.6)
    answers.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    for panel in (by_layer, heads):
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    figure.text(0.05, 0.955, f"Calibration of {found.model or 'a model'}: TSP after layer {found.tsp_layer}, "
                f"{found.setting}", fontsize=14, weight="bold")  # fmt: skip
    figure.text(0.05, 0.922, _summary(found), fontsize=9.5, color=QUIET)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)  # half the bytes
    return small.getvalue()


def _summary(found: Calibration) -> str:
    text = (
        f"{found.samples} samples of {min(found.lengths):,} to {max(found.lengths):,} tokens   ·   TSP rate "
        f"{found.tsp_rate:g}, retention {found.retention_rate:g}   ·   right: {found.right_chosen} of {found.answers}, "
        f"full context {found.right_full}   ·   prefill arithmetic {found.flops_share:.0%} of full context's"
    )
    if found.seconds is not None:
        text += f"   ·   prefill {found.seconds[0] / found.seconds[1]:.2f}× faster, measured"
    return text.replace("%", " %")


def _title(panel: Any, title: str, below: str) -> None:
    panel.set_title(title, fontsize=10, weight="bold", loc="left", pad=20)
    panel.text(0, 1.03, below, transform=panel.transAxes, fontsize=8, color=QUIET)


def _each(found: Calibration):
    """Finalists with their place, colour and marker."""
    for i, setting in enumerate(found.finalists):
        yield i, setting, *LINES[i % len(LINES)]


def _answers(panel: Any, found: Calibration) -> None:
    _title(panel, "Right answers", "greedy, with TSP after this layer; dashed: full context")
    panel.axhline(found.right_full, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for i, setting, colour, marker in _each(found):
        panel.plot(found.layers, found.right[i], color=colour, marker=marker, markersize=5, label=str(setting))
    panel.set(xlabel="TSP layer", ylim=(-0.03 * max(found.answers, 1), 1.06 * max(found.answers, 1)))
    panel.legend(frameon=False, fontsize=8, loc="lower right")


def _distances(panel: Any, found: Calibration) -> None:
    below = f"of the final hidden state; dotted: {1 + found.tolerance:g} × the smallest; ring: earliest below it"
    _title(panel, "Distance to full context (eq. 3)", below)
    for i, setting, colour, marker in _each(found):
        values = found.distance[i]
        panel.plot(found.layers, values, color=colour, marker=marker, markersize=4, label=str(setting))
        panel.axhline((1 + found.tolerance) * values.min(), color=colour, linewidth=1, linestyle=":")
        layer = earliest_close(found.layers, values, found.tolerance)
        panel.plot(layer, values[found.layers.index(layer)], "o", markersize=11, fillstyle="none", color=colour)
    panel.set(xlabel="TSP layer", yscale="log" if found.distance.min() > 0 else "linear")


def _overlap(figure: Any, panel: Any, found: Calibration) -> None:
    _title(panel, "Tokens that two layers agree on", f"share of what TSP would let through, {found.setting}")
    from matplotlib.ticker import MaxNLocator

    values = found.overlap[found.settings.index(found.setting)]
    drawn = panel.imshow(values, SHADES, vmin=0, vmax=1, origin="lower", interpolation="nearest")
    panel.set(xlabel="layer", ylabel="layer")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    bar = figure.colorbar(drawn, ax=panel, fraction=0.046, pad=0.03, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"], fontsize=8)
    bar.outline.set_visible(False)


def _survival(panel: Any, found: Calibration) -> None:
    _title(panel, "The answer's tokens: let through", "share of them that TSP after this layer would propagate")
    for _, setting, colour, marker in _each(found):
        values = found.propagated[found.settings.index(setting)]
        panel.plot(values, color=colour, marker=marker, markersize=4, label=str(setting))
    panel.set(xlabel="layer")


def _heads(panel: Any, found: Calibration) -> None:
    _title(panel, "The answer's tokens: kept", f"share of them in the cache of KV heads, {found.setting}")
    place = found.settings.index(found.setting)
    panel.plot(found.kept_best[place], color=LINES[0][0], marker="o", markersize=4, label="the layer's best head")
    panel.plot(found.kept_mean[place], color=LINES[1][0], marker="s", markersize=4, label="mean of its heads")
    panel.set(xlabel="layer")
    panel.legend(frameon=False, fontsize=8)


def _grid(panel: Any, found: Calibration) -> None:
    """One cell for each setting: rows are windows (and poolings), columns kernels."""
    span = f"mean of layers {found.layers[0]} to {found.layers[-1]}"
    _title(panel, "The answer's tokens: let through, by setting", f"{span}; bold: chosen, underlined: tried")
    rows = sorted({(s.pooling != "max", s.window_size, s.pooling) for s in found.settings})
    kernels = sorted({s.kernel_size for s in found.settings})
    values = np.full((len(rows), len(kernels)), np.nan)
    means = found.propagated[:, list(found.layers)].mean(axis=1)
    for setting, value in zip(found.settings, means, strict=True):
        row = rows.index((setting.pooling != "max", setting.window_size, setting.pooling))
        column = kernels.index(setting.kernel_size)
        values[row, column] = value
        style = {"weight": "bold", "fontsize": 12} if setting == found.setting else {"fontsize": 10}
        colour = "white" if value > 0.55 else INK
        panel.text(column, row, _percent(value), ha="center", va="center", color=colour, **style)
        if setting in found.finalists:
            panel.plot([column - 0.2, column + 0.2], [row + 0.24] * 2, color=colour, linewidth=1.2)
    panel.imshow(values, SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    panel.set_xticks(range(len(kernels)), [str(k) for k in kernels])
    panel.set_yticks(range(len(rows)), [f"{w}" if p == "max" else f"{w} {p}" for _, w, p in rows])
    panel.set(xlabel="kernel", ylabel="window")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.0f} %"
