"""A calibration as a picture: six panels."""

import io
from typing import Any

import numpy as np

from fastkv_jax.calibration.findings import Findings
from fastkv_jax.calibration.rules import earliest_close

DPI, COLOURS = 120, 128
INK, QUIET, PALE = "#1c2430", "#5b6675", "#d5dbe3"
LINES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#56b4e9", "v"))  # Okabe and Ito's
SHADES = "Blues"


def draw(found: Findings) -> bytes:
    """The PNG. Needs matplotlib."""
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


def _summary(found: Findings) -> str:
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


def _each(found: Findings):
    """Finalists with their place, colour and marker."""
    for i, setting in enumerate(found.finalists):
        yield i, setting, *LINES[i % len(LINES)]


def _answers(panel: Any, found: Findings) -> None:
    _title(panel, "Right answers", "greedy, with TSP after this layer; dashed: full context")
    panel.axhline(found.right_full, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for i, setting, colour, marker in _each(found):
        panel.plot(found.layers, found.right[i], color=colour, marker=marker, markersize=5, label=str(setting))
    panel.set(xlabel="TSP layer", ylim=(-0.03 * max(found.answers, 1), 1.06 * max(found.answers, 1)))
    panel.legend(frameon=False, fontsize=8, loc="lower right")


def _distances(panel: Any, found: Findings) -> None:
    below = f"of the final hidden state; dotted: {1 + found.tolerance:g} × the smallest; ring: earliest below it"
    _title(panel, "Distance to full context (eq. 3)", below)
    for i, setting, colour, marker in _each(found):
        values = found.distance[i]
        panel.plot(found.layers, values, color=colour, marker=marker, markersize=4, label=str(setting))
        panel.axhline((1 + found.tolerance) * values.min(), color=colour, linewidth=1, linestyle=":")
        layer = earliest_close(found.layers, values, found.tolerance)
        panel.plot(layer, values[found.layers.index(layer)], "o", markersize=11, fillstyle="none", color=colour)
    panel.set(xlabel="TSP layer", yscale="log" if found.distance.min() > 0 else "linear")


def _overlap(figure: Any, panel: Any, found: Findings) -> None:
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


def _survival(panel: Any, found: Findings) -> None:
    _title(panel, "The answer's tokens: let through", "share of them that TSP after this layer would propagate")
    for _, setting, colour, marker in _each(found):
        values = found.propagated[found.settings.index(setting)]
        panel.plot(values, color=colour, marker=marker, markersize=4, label=str(setting))
    panel.set(xlabel="layer")


def _heads(panel: Any, found: Findings) -> None:
    _title(panel, "The answer's tokens: kept", f"share of them in the cache of KV heads, {found.setting}")
    place = found.settings.index(found.setting)
    panel.plot(found.kept_best[place], color=LINES[0][0], marker="o", markersize=4, label="the layer's best head")
    panel.plot(found.kept_mean[place], color=LINES[1][0], marker="s", markersize=4, label="mean of its heads")
    panel.set(xlabel="layer")
    panel.legend(frameon=False, fontsize=8)


def _grid(panel: Any, found: Findings) -> None:
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
