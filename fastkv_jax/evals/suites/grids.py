"""What the files of configs/suites say: templates and settings of published tasks, byte for byte."""

import importlib.resources
from typing import Any

import yaml


def load(name: str) -> dict[str, Any]:
    """The content of configs/suites/<name>.yaml."""
    file = importlib.resources.files("fastkv_jax").joinpath("configs", "suites", f"{name}.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))
