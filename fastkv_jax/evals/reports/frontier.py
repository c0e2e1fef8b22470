"""What accuracy costs in time: every run of a grid as a point, and the line of those that no other beats in both."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals.reports.tables import Row
from fastkv_jax.files import replacing


@dataclass(frozen=True)
class Point:
    """A run: how many times sooner than the first run its first tokens came, and the mean of its averages."""

    name: str
    speedup: float
    score: float  # 0 to 100


def points(rows: Sequence[Row]) -> list[Point]:
    """In the order of the rows; empty unless every run was timed alone and has scores."""
    if not rows or any("ttft_s" not in row.costs or not row.averages or row.failed for row in rows):
        return []
    first = rows[0].costs["ttft_s"]
    return [
        Point(row.name, first / row.costs["ttft_s"], sum(a.mean for a in row.averages.values()) / len(row.averages))
        for row in rows
    ]


def best(found: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in both, the slowest first."""
    line: list[Point] = []
    for point in sorted(found, key=lambda p: (-p.speedup, -p.score)):
        if not line or point.score > line[-1].score:
            line.append(point)
    return line[::-1]


def draw(found: Sequence[Point], path: str | os.PathLike[str]) -> None:
    """A picture of them, .png or .pdf; whole or absent. Raises `FastKVConfigError` without matplotlib."""
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastKVConfigError("a picture needs matplotlib: pip install 'fastkv-jax[evaluate]'") from error
    with matplotlib.style.context("default"), replacing(Path(path)) as scratch:
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        line = best(found)
        axes.plot([p.speedup for p in line], [p.score for p in line], color="#0CD79F", linewidth=2, zorder=1)
        for number, point in enumerate(found, 1):  # names would write over each other
            axes.scatter(point.speedup, point.score, color="#333333", zorder=2, label=f"{number}  {point.name}")
            axes.annotate(str(number), (point.speedup, point.score), (5, 5), textcoords="offset points")
        figure.legend(loc="outside right center", fontsize=9, handlelength=0, markerscale=0, frameon=False)
        axes.margins(0.1)
        axes.set(xlabel=f"First token, times sooner than {found[0].name}", ylabel="Mean score, 0 to 100")
        axes.grid(alpha=0.3)
        figure.savefig(scratch, dpi=150)
