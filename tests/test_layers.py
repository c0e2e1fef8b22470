"""The layering of the packages, read from their imports: nobody imports upwards, nothing goes in circles."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("fastkv_jax/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")])

# What each part of fastkv_jax may import from it. The parts are its files and its folders.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "rope": {"config"},
    "cache": set(),
    "select": set(),
    "attention": set(),
    "buckets": {"errors"},
    "sharding": {"config", "errors"},
    "inputs": {"buckets", "config", "errors"},
    "model": {"config", "rope"},
    "methods": {"errors"},
    "sampling": {"errors"},
}
MAY_IMPORT["inference"] = set(MAY_IMPORT)
MAY_IMPORT["presets"] = {"errors", "methods"}
MAY_IMPORT["checkpoint"] = set(MAY_IMPORT) - {"presets"}
MAY_IMPORT["text"] = set(MAY_IMPORT)
MAY_IMPORT["stream"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT) | {"__init__"}
MAY_IMPORT["__init__"] = set(MAY_IMPORT) - {"cli"}
MAY_IMPORT["__main__"] = {"cli"}


def imports(file: Path) -> set[str]:
    """Full names of the modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str:
    """fastkv_jax.methods.base.Rows -> methods; a name of the package itself -> __init__."""
    words = module.split(".")
    return words[1] if len(words) > 1 and words[1] in MAY_IMPORT else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_what_lies_below(file):
    package, *rest = file.relative_to(ROOT).with_suffix("").parts
    names = imports(file)
    if package == "kernels_pallas":
        roots = {name.split(".")[0] for name in names}
        assert roots <= {"jax", "jaxtyping", "kernels_pallas", "numpy", "typing", "dataclasses"}
        return
    part = rest[0]
    used = {part_of(name) for name in names if name.split(".")[0] == "fastkv_jax"} - {part}
    assert used <= MAY_IMPORT[part], f"{part} imports {used - MAY_IMPORT[part]}"
    if any(name.startswith("kernels_pallas") for name in names):
        assert part in ("select", "methods", "inference")
    if file.name != "against_transformers.py":
        assert not any(name.split(".")[0] == "torch" for name in names)


def test_no_part_needs_itself():
    graph: dict[str, set[str]] = {}
    for file in FILES:
        package, *rest = file.relative_to(ROOT).with_suffix("").parts
        if package == "fastkv_jax" and rest[0] != "__init__":
            used = {part_of(name) for name in imports(file) if name.startswith("fastkv_jax")}
            graph.setdefault(rest[0], set()).update(used - {rest[0], "__init__"})
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_importing_changes_neither_jax_nor_the_environment():
    code = """
import os, jax
before = dict(os.environ), dict(jax.config.values)
import fastkv_jax
assert before == (dict(os.environ), dict(jax.config.values))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
