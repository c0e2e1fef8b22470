"""What benchmark.py found, as a table in Markdown, as JSON, and as a picture."""

import json
from pathlib import Path
from typing import Any

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.files import replacing

HEAD = (
    "tokens",
    "run",
    "prefill s (min–max)",
    "times faster (limit)",
    "of the product rate",
    "scoring and selection",
    "decode ms (min–max)",
    "times faster (limit)",
    "of the copy rate",
    "whole s",
    "times faster",
)


def as_markdown(found: dict[str, Any]) -> str:
    """The device's own rates, if measured, and a row for each run; limits are those of the arithmetic."""
    head = (
        f"{found['model']}, {found['dtype']}, batch {found['batch']}, {found['new_tokens']} new tokens, "
        f"{found['repeats']} rounds; {found['device']}, jax {found['jax']}"
    )
    if "product_flops_per_s" in found:
        product, copy = found["product_flops_per_s"] / 1e12, found["copy_bytes_per_s"] / 1e9
        head += f": a matrix product makes {product:,.3g} TFLOP/s, a copy moves {copy:,.1f} GB/s"
    if "peer" in found:
        head += f"; {found['peer']}"
    lines = [
        head,
        "",
        f"| {' | '.join(HEAD)} |",
        f"| --: | :-- {'| --: ' * (len(HEAD) - 2)}|",
    ]
    for row in found["rows"]:
        peer = row["name"] not in found["settings"]
        prefill, decode = (
            f"{row[f'{part}_speedup']:.2f}" + ("" if peer else f" ({row[f'{part}_limit']:.2f})")
            for part in ("prefill", "decode")
        )
        low, high = row["prefill_range_s"]
        quick, slow = (1e3 * seconds for seconds in row["decode_range_s"])
        cells = [
            f"{row['tokens']:,}",
            row["name"],
            f"{row['prefill_s']:.2f} ({low:.2f}–{high:.2f})",
            prefill,
            _share(row, "share_of_product", 0),
            _share(row, "scoring_share", 2),
            f"{1e3 * row['decode_s']:.1f} ({quick:.1f}–{slow:.1f})",
            decode,
            _share(row, "share_of_copy", 0),
            f"{row['whole_s']:.2f}",
            f"{row['whole_speedup']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(row: dict[str, Any], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}%}" if name in row else ""


def write(found: dict[str, Any], folder: str) -> None:
    """speed.json, speed.md and speed.png; each is whole or absent. Raises `FastKVConfigError` without matplotlib."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (("speed.json", json.dumps(found, indent=1)), ("speed.md", as_markdown(found))):
        with replacing(path / name) as scratch:
            scratch.write_text(text + "\n", encoding="utf-8")
    _draw(found, path / "speed.png")


def _draw(found: dict[str, Any], path: Path) -> None:
    """Bars: how many times faster than full context, for each length, and the arithmetic's limit as a line."""
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastKVConfigError("a picture needs matplotlib: pip install 'fastkv-jax[evaluate]'") from error
    names = list({row["name"]: 0 for row in found["rows"]})
    lengths = sorted({row["tokens"] for row in found["rows"]})
    with matplotlib.style.context("default"), replacing(path) as scratch:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        width = 0.8 / len(names)
        parts = (("prefill", "Prefill"), ("decode", "Decode"), ("whole", "Prompt to last token"))
        for axes, (part, title) in zip(figure.subplots(1, 3, sharey=True), parts, strict=True):
            for row in found["rows"]:
                i, j = names.index(row["name"]), lengths.index(row["tokens"])
                x = j + (i - (len(names) - 1) / 2) * width
                label = row["name"] if j == 0 else None
                axes.bar(x, row[f"{part}_speedup"], width, color=f"C{i}", label=label)
                if row["name"] in found["settings"] and part != "whole":
                    axes.hlines(row[f"{part}_limit"], x - width / 2, x + width / 2, color="black", linewidth=1)
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axes.set(xlabel="Prompt in tokens", title=title)
        figure.axes[0].set_ylabel("Times faster than full context\n(line: the arithmetic's limit)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
        figure.savefig(scratch, dpi=150)
