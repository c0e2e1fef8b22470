"""A picture as PNG. All panels are laid out in whole pixels: what is drawn is exactly one number per pixel."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.explanation.kept import Kept

DPI = 150
WIDTH, LEFT, MAP, GUTTER, BARS = 1800, 110, 1250, 90, 270
HEADER, STRIP, FOOTER = 125, 26, 95
SHADES = ("#f1f4f8", "#a6cbe3", "#4a90c2", "#1b5a96", "#08264d")  # 0 to 100 %: one hue, only lighter and darker
ORANGE, INK, QUIET = "#d55e00", "#1c2430", "#5b6675"


def resample(values: np.ndarray, size: int) -> Float[np.ndarray, "... size"]:
    """The last axis at `size` pixels: the mean of each pixel's values, or values repeated where they are fewer."""
    n = values.shape[-1]
    starts = np.arange(size) * n // size
    if n <= size:
        return values[..., starts].astype(np.float32)
    return np.add.reduceat(values, starts, axis=-1, dtype=np.float32) / np.diff(starts, append=n)


def _map(explanation: Kept, layer_height: int) -> Float[np.ndarray, "height MAP"]:
    """Pixels of the large panel: a block for each layer, in it a row for each head, below it a gap (NaN)."""
    inner = layer_height - (2 if layer_height >= 10 else 1)
    pixels = np.full((len(explanation.heads), layer_height, MAP), np.nan, np.float32)
    for block, kept, heads in zip(pixels, explanation.kept, explanation.heads, strict=True):
        rows = inner // heads * heads or inner  # all heads equally high, if there is a pixel for each
        block[:rows] = resample(resample(kept[:heads], MAP).T, rows).T
    return pixels.reshape(-1, MAP)


def render(explanation: Kept) -> bytes:
    """The picture. Raises `FastKVConfigError` if matplotlib is missing."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise FastKVConfigError(
            "a .png needs matplotlib: pip install 'fastkv-jax[explain]' (a .html needs nothing)"
        ) from error
    style = {"font.size": 9, "axes.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK}
    style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), QUIET)
    with matplotlib.style.context(["default", style]):
        return _draw(explanation)


class _Canvas:
    """A figure that is divided by pixels from its upper left corner."""

    def __init__(self, height: int):
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")

    def axes(self, left: int, upper: int, width: int, high: int) -> Any:
        """A panel of its own."""
        size = left / WIDTH, 1 - (upper + high) / self.height, width / WIDTH, high / self.height
        return self.figure.add_axes(size)

    def text(self, upper: int, words: str, **style: Any) -> None:
        """Words whose middle is so far below the upper edge."""
        self.figure.text(LEFT / WIDTH, 1 - upper / self.height, words, va="center", **style)

    def png(self) -> bytes:
        """What a file holds."""
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=DPI)
        return out.getvalue()


def _draw(explanation: Kept) -> bytes:
    layers = len(explanation.heads)
    layer_height = min(max(4, 600 // layers), max(40, 160 // layers))
    strips: list[tuple[str, np.ndarray, Sequence[str]]] = [("all heads", explanation.share, SHADES)]
    if explanation.propagated is not None:
        strips.insert(0, ("propagated", explanation.propagated, (SHADES[0], ORANGE)))
    top = HEADER + len(strips) * (STRIP + 8) + 8
    canvas = _Canvas(top + layers * layer_height + FOOTER)
    for i, (name, values, shades) in enumerate(strips):
        _draw_strip(canvas.axes(LEFT, HEADER + i * (STRIP + 8), MAP, STRIP), name, values, shades)
    panel = canvas.axes(LEFT, top, MAP, layers * layer_height)
    bars = canvas.axes(LEFT + MAP + GUTTER, top, BARS, layers * layer_height)
    middle = np.arange(layers) * layer_height + layer_height / 2 - 1
    drawn = _draw_map(panel, explanation, layer_height, middle)
    _draw_bars(bars, explanation, layer_height, middle)
    bars.set(ylim=panel.get_ylim())
    for axis in (panel, bars):
        axis.tick_params(length=3, width=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if explanation.boundary:
        line, n = explanation.boundary * layer_height - 1, len(explanation.token_ids)
        for axis in (panel, bars):
            axis.axhline(line, color=ORANGE, linewidth=1.4)
        panel.text(n * 1.008, line, "◂ TSP", color=ORANGE, va="center", fontsize=8, weight="bold")
    _draw_scale(canvas.figure, canvas.axes(LEFT + MAP + GUTTER, 52, BARS, 16), drawn)
    first, second = explanation.summary().splitlines()
    canvas.text(40, "What was propagated and kept", fontsize=13, weight="bold")
    canvas.text(76, f"{first}\n{second}", fontsize=8.5, color=QUIET)
    return canvas.png()


def _image(panel: Any, pixels: np.ndarray, n: int, shades: Sequence[str]) -> Any:
    """Shares as colours, over positions 0 ... n."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    norm = PowerNorm(0.5, 0, 1)  # few kept tokens in a wide bin would be invisible on a linear scale
    colours = LinearSegmentedColormap.from_list("share", shades)
    extent = (0, n, len(pixels), 0)
    return panel.imshow(pixels, colours, norm, aspect="auto", interpolation="nearest", extent=extent)


def _draw_strip(panel: Any, name: str, values: np.ndarray, shades: Sequence[str]) -> None:
    """A row of pixels with its name beside it."""
    _image(panel, resample(values[None], MAP), len(values), shades)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.text(1.008, 0.5, name, transform=panel.transAxes, va="center", color=QUIET, fontsize=8)


def _draw_map(panel: Any, explanation: Kept, layer_height: int, middle: Float[np.ndarray, " L"]) -> Any:
    """Positions from left to right, layers from top to bottom."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    n, layers = len(explanation.token_ids), len(explanation.heads)
    drawn = _image(panel, _map(explanation, layer_height), n, SHADES)
    shown = MaxNLocator(min(layers, 12), integer=True).tick_values(0, layers - 1)
    shown = [int(i) for i in shown if 0 <= i < layers]
    panel.set_yticks(middle[shown], [str(i) for i in shown])
    panel.set_ylabel("layer (rows: heads)")
    panel.set_xlabel(f"position in the prompt (tokens{'' if n <= MAP else f', {n / MAP:.3g} to a pixel'})")
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return drawn


def _draw_bars(bars: Any, explanation: Kept, layer_height: int, middle: Float[np.ndarray, " L"]) -> None:
    """Entries of each layer's heads: their mean, and from the fewest to the most."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    counts = [kept[:heads].sum(-1) for kept, heads in zip(explanation.kept, explanation.heads, strict=True)]
    means = np.array([c.mean() for c in counts])
    bars.barh(middle, means, layer_height * 0.75, color=SHADES[2])
    low, high = (np.array([reduce(c) for c in counts]) for reduce in (np.min, np.max))
    uneven = low < high
    if uneven.any():
        spread = np.abs(np.stack([low, high]) - means)[:, uneven]
        bars.errorbar(means[uneven], middle[uneven], xerr=spread, fmt="none", ecolor=INK, elinewidth=1)
    bars.set(yticks=[], xlabel="entries kept per head", xlim=(0, max(high.max(), 1) * 1.06))
    bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    bars.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _draw_scale(figure: Any, scale: Any, drawn: Any) -> None:
    """What the colours mean."""
    from matplotlib.ticker import PercentFormatter

    bar = figure.colorbar(drawn, cax=scale, orientation="horizontal", ticks=[0, 0.1, 0.25, 0.5, 1])
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    bar.ax.tick_params(length=3, width=0.6, labelsize=8)
    bar.outline.set_visible(False)
    scale.set_title("share kept", fontsize=8, loc="left", color=QUIET)
