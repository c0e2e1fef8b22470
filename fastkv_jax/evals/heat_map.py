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
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"a heat map is written as {' or '.join(FORMATS)}, got {os.fspath(path)!r}")
    lengths, depths, means = table(cells)
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastKVConfigError("a heat map needs matplotlib: pip install 'fastkv-jax[evaluate]'") from error
    with matplotlib.style.context("default"), replacing(path) as scratch:
        figure = Figure(
            figsize=(2.5 + 0.8 * max(len(lengths), 5), 2 + 0.45 * max(len(depths), 5)), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("found", COLOURS)
        edges = [np.arange(len(values) + 1) - 0.5 for values in (lengths, depths)]
        grid = axes.pcolormesh(
            *edges, np.ma.masked_invalid(means), cmap=colours, vmin=0, vmax=1, edgecolors="grey", linewidth=0.5
        )
        axes.invert_yaxis()  # the text's beginning is at the top
        axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth}" for depth in depths])
        axes.set(xlabel="Length in tokens", ylabel="Depth in per cent", title=f"Mean score {np.nanmean(means):.3f}")
        figure.colorbar(grid, label="Score")
        figure.savefig(scratch, dpi=150)


def _short(length: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length:,}"
