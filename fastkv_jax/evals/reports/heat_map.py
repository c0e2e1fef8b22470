"""The needle test's picture."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.files import replacing

COLOURS = ("#F0496E", "#EBB839", "#0CD79F")  # from nothing found to all
FORMATS = (".png", ".pdf")
ACROSS = 5  # maps beside each other


def table(cells: Iterable[Mapping[str, Any]]) -> tuple[list[int], list[int], np.ndarray]:
    """(lengths, depths, mean scores [depths, lengths], NaN where there are none) of rows with group and score.

    Raises `InputError` if there are none, or for a group that is not "<length>/<depth>".
    """
    scores: dict[tuple[int, int], list[float]] = {}
    for cell in cells:
        length, _, depth = str(cell["group"]).partition("/")
        if not (length.isdecimal() and depth.isdecimal()):
            raise InputError(f"a cell's group must be <length>/<depth>, got {cell['group']!r}")
        scores.setdefault((int(length), int(depth)), []).append(float(cell["score"]))
    if not scores:
        raise InputError("a heat map needs one cell at least")
    lengths, depths = (sorted(set(values)) for values in zip(*scores, strict=True))
    means = [[np.mean(scores.get((length, depth), [np.nan])) for length in lengths] for depth in depths]
    return lengths, depths, np.array(means)


def heat_map(cells: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw scores, 0 to 1, over length and depth; .png or .pdf. The file is complete or absent.

    A cell without a score is left white. Raises `InputError` for another suffix or no cells, `FastKVConfigError` if
    matplotlib is missing.
    """
    heat_maps({"": cells}, path)


def heat_maps(runs: Mapping[str, Iterable[Mapping[str, Any]]], path: str | os.PathLike[str]) -> None:
    """The maps of several runs in one picture, each under its name; as `heat_map`."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"a heat map is written as {' or '.join(FORMATS)}, got {os.fspath(path)!r}")
    maps = {name: table(cells) for name, cells in runs.items()}
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastKVConfigError("a heat map needs matplotlib: pip install 'fastkv-jax[evaluate]'") from error
    across = min(len(maps), ACROSS)
    down = -(-len(maps) // across)
    columns, rows = (max(len(found[i]) for found in maps.values()) for i in (0, 1))
    small = len(maps) > 1
    wide = across * (0.55 * max(columns, 3) + 0.5) if small else 0.8 * max(columns, 5)
    high = down * (0.35 * max(rows, 3) + 0.9) if small else 0.45 * max(rows, 5)
    with matplotlib.style.context("default"), replacing(path) as scratch:
        figure = Figure(figsize=(2.5 + wide, 2 + high), layout="constrained")
        FigureCanvasAgg(figure)
        colours = LinearSegmentedColormap.from_list("found", COLOURS)
        drawn = []
        places = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes in places.flat[len(maps) :]:
            axes.set_visible(False)
        for axes, (name, (lengths, depths, means)) in zip(places.flat, maps.items(), strict=False):
            edges = [np.arange(len(values) + 1) - 0.5 for values in (lengths, depths)]
            masked = np.ma.masked_invalid(means)
            drawn.append(
                axes.pcolormesh(*edges, masked, cmap=colours, vmin=0, vmax=1, edgecolors="grey", linewidth=0.5)
            )
            axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths], rotation=45)
            axes.set_yticks(range(len(depths)), [f"{depth}" for depth in depths])
            axes.tick_params(labelbottom=True)
            mean = f"mean score {np.nanmean(means):.3f}"
            axes.set_title(f"{name}\n{mean}" if name else mean.capitalize(), fontsize=9 if small else None)
        places.flat[0].invert_yaxis()  # the text's beginning is at the top; the panels share the axis
        figure.supxlabel("Length in tokens")
        figure.supylabel("Depth in per cent")
        figure.colorbar(drawn[0], ax=places, label="Score")
        figure.savefig(scratch, dpi=150)


def _short(length: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length:,}"
