"""A calibration to keep: a preset to use, a picture to read."""

import os
from pathlib import Path

import yaml

from fastkv_jax.calibration.findings import Findings
from fastkv_jax.calibration.picture import INK, QUIET, draw
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.files import check_target, replacing


class Calibration(Findings):
    """What was measured and chosen, with its files."""

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
            scratch.write_bytes(draw(self))


def check_path(path: str | os.PathLike[str], suffix: str) -> Path:
    """The path, or `FastKVConfigError` for another suffix, `InputError` for a bad place."""
    if Path(path).suffix.lower() != suffix:
        raise FastKVConfigError(f"cannot write {path}: its name must end in {suffix}")
    return check_target(path)


class _Lines(yaml.SafeDumper):
    """One line for a list of numbers, as people would write it."""


_Lines.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))
