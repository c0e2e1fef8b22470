"""A picture of what was propagated and kept, per layer and head, over the text: as PNG or as one HTML page."""

import base64
import hashlib
import importlib.resources
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from fastkv_jax.decoding.answers import TextStream
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.files import check_target, replacing
from fastkv_jax.prefilling.doors import Prefill


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one prompt left behind, by true positions 0 ... n - 1.

    token_ids   [n]
    words       the text of each token, "" where a character goes on in the next one; ids where there is no tokenizer
    has_text    whether `words` are texts
    kept        [L, N, n]: whether a head of a layer keeps a position
    heads       [L]: cache heads of each layer; N is the most of any layer, and rows beyond a layer's own are False
    propagated  [n]: whether a position passed the last TSP layer; None where nothing was left behind
    """

    token_ids: Int[np.ndarray, " n"]
    words: tuple[str, ...]
    has_text: bool
    kept: Bool[np.ndarray, "L N n"]
    heads: tuple[int, ...]
    propagated: Bool[np.ndarray, " n"] | None

    @property
    def share(self) -> Float[np.ndarray, " n"]:
        """The share of all (layer, head) pairs that keep each position."""
        return self.kept.sum((0, 1)) / sum(self.heads)

    @property
    def boundary(self) -> int | None:
        """The first layer from which on only propagated positions are kept; None where that divides nothing.

        Read off what was kept: the layer after the TSP layer, unless that one kept nothing but propagated positions.
        """
        if self.propagated is None or self.propagated.all():
            return None
        strays = np.flatnonzero((self.kept & ~self.propagated).any((1, 2)))
        first = int(strays[-1]) + 1 if strays.size else 0
        return first if first < len(self.heads) else None

    def summary(self) -> str:
        """Two lines for people."""
        n, pairs = len(self.token_ids), sum(self.heads)
        everywhere = int((self.kept.sum((0, 1)) == pairs).sum())
        kept = (
            f"{n:,} tokens, {len(self.heads)} layers x {_span(self.heads)} heads: "
            f"{100 * self.kept.sum() / (n * pairs):.1f} % of the KV entries kept, {everywhere:,} tokens by every head"
        )
        if self.propagated is None:
            return f"{kept}\nall tokens went through all layers"
        passed = int(self.propagated.sum())
        where = "" if self.boundary is None else f" to layers {self.boundary}-{len(self.heads) - 1}"
        return f"{kept}\n{passed:,} tokens ({100 * passed / n:.1f} %) were propagated{where}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a picture (.png, needs matplotlib) or a page that needs nothing but a browser (.html).

        The file is complete or absent; one that is there is replaced. Raises as `check_path`, and `FastKVConfigError`
        if matplotlib is missing.
        """
        render = check_path(path)
        content = render(self)
        with replacing(path) as scratch:
            scratch.write_bytes(content)


def check_path(path: str | os.PathLike[str]) -> Callable[[Explanation], bytes]:
    """What makes a file of this name, or `FastKVConfigError` for another suffix, `InputError` for a bad place."""
    render = _RENDERERS.get(Path(path).suffix.lower())
    if render is None:
        raise FastKVConfigError(f"cannot write {path}: its name must end in {' or '.join(_RENDERERS)}")
    check_target(path)
    return render


def explain(result: Prefill, tokens: Any, tokenizer: Any = None, *, row: int = 0, start: Any = None) -> Explanation:
    """What `prefill` propagated and kept of one row, over its text.

    tokens     [B, T] int32 as given to `prefill`; start [B] the first valid column, 0 if None
    tokenizer  a transformers tokenizer, to show text instead of ids
    row        which prompt of the batch

    Everything is brought to the host. Raises `InputError` if the arguments do not fit each other, or if the cache was
    already given to decoding.
    """
    ids = _row_ids(result, tokens, start, row)
    layers = range(result.cache.k_new.shape[0])
    positions = [np.asarray(result.cache.layer(i).positions[row]) for i in layers]
    heads = tuple(p.shape[0] for p in positions)
    kept = np.zeros((len(layers), max(heads), ids.size), bool)
    for layer, head_positions in enumerate(positions):
        for head, p in enumerate(head_positions):
            kept[layer, head] = _marked(p, ids.size)
    propagated = None if result.propagated is None else _marked(np.asarray(result.propagated[row]), ids.size)
    words = [str(i) for i in ids] if tokenizer is None else _texts(tokenizer, ids.tolist())
    return Explanation(ids, tuple(words), tokenizer is not None, kept, heads, propagated)


def _row_ids(result: Prefill, tokens: Any, start: Any, row: int) -> Int[np.ndarray, " n"]:
    """The token ids of one row without its padding, after checking that they are what `result` was made from."""
    batch, vocabulary = result.logits.shape
    if isinstance(result.cache.k_new, jax.Array) and result.cache.k_new.is_deleted():
        raise InputError("the cache of this result was given to decoding, which donates it: explain the result before")
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError("tokens must be int32 of shape [batch, length], got rows of different lengths") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"tokens must be int32 of shape [batch, length], got {array.dtype} {list(array.shape)}")
    if len(array) != batch:
        raise InputError(f"tokens have {len(array)} rows, the result has {batch}")
    if not isinstance(row, int | np.integer) or isinstance(row, bool) or not 0 <= row < batch:
        raise InputError(f"row {row!r} is outside 0..{batch - 1}")
    first = np.zeros(batch, np.int32) if start is None else np.asarray(start)
    if first.shape != (batch,) or not np.issubdtype(first.dtype, np.integer) or (first < 0).any():
        raise InputError(f"start must be {batch} integers >= 0, got {start!r}")
    ids = array[row, first[row] :]
    following, decoded = int(result.cache.position[row]), int(result.cache.used)
    if not following - decoded <= ids.size <= following:  # a row may have decoded fewer
        made = following - decoded
        raise InputError(f"row {row} has {ids.size:,} tokens, the result was made from {made:,}: pass its own start")
    if (ids < 0).any() or (ids >= vocabulary).any():
        raise InputError(f"row {row} holds token ids outside the result's vocabulary of {vocabulary}")
    return ids


def _marked(positions: Int[np.ndarray, " C"], n: int) -> Bool[np.ndarray, " n"]:
    """Which of 0 ... n - 1 are among `positions`, where -1 is none."""
    if positions.max(initial=-1) >= n:
        raise InputError(f"the cache holds position {positions.max()}, the tokens given end at {n - 1}")
    marks = np.zeros(n, bool)
    marks[positions[positions >= 0]] = True
    return marks


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character made of several tokens belongs to the last of them."""
    stream, texts = TextStream(tokenizer, skip_special_tokens=False), []
    for token, following in zip(ids, [*ids[1:], None], strict=True):
        text = stream.push(token)
        # A run of byte tokens ends with its last one, not with the token after it.
        ends = following is None or (stream.is_byte(token) and not stream.is_byte(following))
        texts.append(text + stream.flush() if ends else text)
    return texts


def _span(numbers: Sequence[int]) -> str:
    """3,3,3 -> 3; 3,9 -> 3-9."""
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


# ---------------------------------------------------------------------------------------------------------------------
# PNG. All panels are laid out in whole pixels: what is drawn is exactly one number per pixel.
# ---------------------------------------------------------------------------------------------------------------------

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


def _map(explanation: Explanation, layer_height: int) -> Float[np.ndarray, "height MAP"]:
    """Pixels of the large panel: a block for each layer, in it a row for each head, below it a gap (NaN)."""
    inner = layer_height - (2 if layer_height >= 10 else 1)
    pixels = np.full((len(explanation.heads), layer_height, MAP), np.nan, np.float32)
    for block, kept, heads in zip(pixels, explanation.kept, explanation.heads, strict=True):
        rows = inner // heads * heads or inner  # all heads equally high, if there is a pixel for each
        block[:rows] = resample(resample(kept[:heads], MAP).T, rows).T
    return pixels.reshape(-1, MAP)


def _png(explanation: Explanation) -> bytes:
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


def _draw(explanation: Explanation) -> bytes:
    import io

    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    n, layers = len(explanation.token_ids), len(explanation.heads)
    layer_height = min(max(4, 600 // layers), max(40, 160 // layers))
    strips: list[tuple[str, np.ndarray, Sequence[str]]] = [("all heads", explanation.share, SHADES)]
    if explanation.propagated is not None:
        strips.insert(0, ("propagated", explanation.propagated, (SHADES[0], ORANGE)))
    top = HEADER + len(strips) * (STRIP + 8) + 8
    height = top + layers * layer_height + FOOTER
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    norm = PowerNorm(0.5, 0, 1)  # few kept tokens in a wide bin would be invisible on a linear scale

    def axes(left: int, upper: int, width: int, high: int) -> Any:
        return figure.add_axes((left / WIDTH, 1 - (upper + high) / height, width / WIDTH, high / height))

    def image(panel: Any, pixels: np.ndarray, shades: Sequence[str]) -> Any:
        colours = LinearSegmentedColormap.from_list("share", shades)
        extent = (0, n, len(pixels), 0)
        return panel.imshow(pixels, colours, norm, aspect="auto", interpolation="nearest", extent=extent)

    for i, (name, values, shades) in enumerate(strips):
        panel = axes(LEFT, HEADER + i * (STRIP + 8), MAP, STRIP)
        image(panel, resample(values[None], MAP), shades)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.text(1.008, 0.5, name, transform=panel.transAxes, va="center", color=QUIET, fontsize=8)

    panel = axes(LEFT, top, MAP, layers * layer_height)
    pixels = _map(explanation, layer_height)
    drawn = image(panel, pixels, SHADES)
    middle = np.arange(layers) * layer_height + layer_height / 2 - 1
    shown = MaxNLocator(min(layers, 12), integer=True).tick_values(0, layers - 1)
    shown = [int(i) for i in shown if 0 <= i < layers]
    panel.set_yticks(middle[shown], [str(i) for i in shown])
    panel.set_ylabel("layer (rows: heads)")
    panel.set_xlabel(f"position in the prompt (tokens{'' if n <= MAP else f', {n / MAP:.3g} to a pixel'})")
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_major_locator(MaxNLocator(10, integer=True))

    bars = axes(LEFT + MAP + GUTTER, top, BARS, layers * layer_height)
    counts = [kept[:heads].sum(-1) for kept, heads in zip(explanation.kept, explanation.heads, strict=True)]
    means = np.array([c.mean() for c in counts])
    bars.barh(middle, means, layer_height * 0.75, color=SHADES[2])
    low, high = (np.array([reduce(c) for c in counts]) for reduce in (np.min, np.max))
    uneven = low < high
    if uneven.any():
        spread = np.abs(np.stack([low, high]) - means)[:, uneven]
        bars.errorbar(means[uneven], middle[uneven], xerr=spread, fmt="none", ecolor=INK, elinewidth=1)
    bars.set(ylim=panel.get_ylim(), yticks=[], xlabel="entries kept per head", xlim=(0, max(high.max(), 1) * 1.06))
    bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    bars.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axis in (panel, bars):
        axis.tick_params(length=3, width=0.6)
        axis.spines[["top", "right"]].set_visible(False)

    if explanation.boundary:
        line = explanation.boundary * layer_height - 1
        for axis in (panel, bars):
            axis.axhline(line, color=ORANGE, linewidth=1.4)
        panel.text(n * 1.008, line, "◂ TSP", color=ORANGE, va="center", fontsize=8, weight="bold")

    scale = axes(LEFT + MAP + GUTTER, 52, BARS, 16)
    bar = figure.colorbar(drawn, cax=scale, orientation="horizontal", ticks=[0, 0.1, 0.25, 0.5, 1])
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    bar.ax.tick_params(length=3, width=0.6, labelsize=8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    scale.set_title("share kept", fontsize=8, loc="left", color=QUIET)

    first, second = explanation.summary().splitlines()
    figure.text(LEFT / WIDTH, 1 - 40 / height, "What was propagated and kept", fontsize=13, weight="bold", va="center")
    figure.text(LEFT / WIDTH, 1 - 76 / height, f"{first}\n{second}", fontsize=8.5, color=QUIET, va="center")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# HTML: page.html with the data in it
# ---------------------------------------------------------------------------------------------------------------------

# What must not reach a page: controls (shown as their pictures; newline and tab stay), and marks that reorder text.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_REORDER = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *_REORDER], 0xFFFD)


def _pack(bits: Bool[np.ndarray, "... n"]) -> str:
    """Rows of bits, each from a new byte on, the first position in the lowest bit; as base64."""
    return base64.b64encode(np.packbits(bits, axis=-1, bitorder="little").tobytes()).decode()


def _html(explanation: Explanation) -> bytes:
    rows = np.concatenate([kept[:heads] for kept, heads in zip(explanation.kept, explanation.heads, strict=True)])
    data = {
        "summary": explanation.summary(),
        "words": [word.translate(_VISIBLE) for word in explanation.words],
        "ids": explanation.token_ids.tolist() if explanation.has_text else None,
        "heads": explanation.heads,
        "kept": _pack(rows),
        "propagated": None if explanation.propagated is None else _pack(explanation.propagated),
        "boundary": explanation.boundary,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&":  # no token can end the script element that holds the data
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = (importlib.resources.files("fastkv_jax") / "explanation" / "page.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    before, after = template.replace("%SCRIPT_HASH%", f"sha256-{digest}").split("%DATA%")
    return f"{before}{text}{after}".encode(errors="replace")


_RENDERERS: dict[str, Callable[[Explanation], bytes]] = {".png": _png, ".html": _html}
