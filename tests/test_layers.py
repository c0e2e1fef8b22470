"""The layering of the packages, read from their imports: each module knows only the levels below it."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastkv_jax

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("fastkv_jax", "kernels_pallas")
    for file in sorted((ROOT / package).rglob("*.py"))
}
PAGE = ROOT / "docs" / "architecture.md"
FLOORS = {
    module: int(floor)
    for floor, module in re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
}
DOORS = {"fastkv_jax", "__main__"}  # the package itself and its command; everything is below them


def nodes(name):
    return ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))


def imports(name):
    """Full names of all modules that a module imports, also inside functions."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in FILES else node.module for full in whole}
    return found


def part(module):
    """fastkv_jax.cli.generate -> cli, fastkv_jax.text -> text, kernels_pallas.select -> kernels_pallas."""
    package, _, rest = module.partition(".")
    return package if package == "kernels_pallas" or not rest else rest.split(".")[0]


def internal(name):
    return {module for module in imports(name) if module.partition(".")[0] in ("fastkv_jax", "kernels_pallas")}


def test_every_module_has_its_floor():
    assert {part(name) for name in FILES} == set(FLOORS) | DOORS


@pytest.mark.parametrize("name", [name for name in FILES if part(name) not in DOORS])
def test_a_module_imports_only_from_floors_below(name):
    others = {part(module) for module in internal(name)} - {part(name), "fastkv_jax"}
    assert {other: FLOORS[other] for other in others if FLOORS[other] >= FLOORS[part(name)]} == {}


@pytest.mark.parametrize("module", list(FLOORS))
def test_no_floor_is_higher_than_it_must_be(module):
    below = {part(other) for name in FILES if part(name) == module for other in internal(name)}
    assert FLOORS[module] == 1 + max((FLOORS[other] for other in below - {module, "fastkv_jax"}), default=-1)


@pytest.mark.parametrize("name", [name for name in FILES if part(name) == "kernels_pallas"])
def test_kernels_know_nothing_but_jax(name):
    assert {module.partition(".")[0] for module in imports(name)} - sys.stdlib_module_names <= {
        "jax", "numpy", "jaxtyping", "kernels_pallas",
    }  # fmt: skip


def test_only_the_command_line_imports_the_command_line():
    assert {part(name) for name in FILES if "cli" in map(part, internal(name))} == {"cli", "__main__"}


def test_imports_form_no_cycle():
    """Importing a module runs the __init__ of its packages first; fastkv_jax's own is the public door, below nobody."""
    graph = {name: set() for name in FILES if name != "fastkv_jax"}
    for name, known in graph.items():
        known |= internal(name) - {name, "fastkv_jax"}
        above = {".".join(parts[:i]) for module in known for parts in [module.split(".")] for i in range(2, len(parts))}
        known |= {package for package in above if not f"{name}.".startswith(f"{package}.")}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)
    users = {name for name in FILES if "fastkv_jax" in internal(name)}
    assert {part(name) for name in users} <= {"cli"}  # for its version


def test_there_are_few_floors_and_rooms_of_a_size():
    assert max(FLOORS.values()) < 10
    rooms = {file.parent for file in FILES.values()} - {ROOT / "fastkv_jax" / "methods"}  # a file for each method
    assert {room: count for room in rooms if (count := len(list(room.glob("*.py")))) > 11} == {}


@pytest.mark.parametrize("name", [name for name in FILES if part(name) != "kernels_pallas"])
def test_files_and_functions_are_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 300
    functions = [node for node in nodes(name) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno >= 60] == []


def test_the_rooms_on_the_page_are_those_there_are():
    listed = re.findall(r"^\| `(\w+)/(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    rooms = {room for room, _ in listed}
    there = {tuple(name.split(".")[1:]) for name in FILES if part(name) in rooms and name.count(".") == 2}
    assert sorted(listed) == sorted(there)


def test_no_module_is_named_like_a_public_function():
    """Importing it would put the module in the function's place."""
    functions = {name for name in fastkv_jax.__all__ if not isinstance(getattr(fastkv_jax, name), type)}
    assert {module.split(".")[1] for module in FILES if "." in module} & functions == set()


def test_pytorch_is_imported_only_to_be_timed_against_and_only_when_asked_for():
    users = {name for name in FILES if any(module.partition(".")[0] == "torch" for module in imports(name))}
    assert users <= {"fastkv_jax.benchmarks.torch_peer"}
    for name in users:
        top = ast.parse(FILES[name].read_text()).body
        assert not any("torch" in ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom))


def test_importing_the_package_changes_neither_jax_nor_the_environment():
    code = """
import json, os, jax
before = dict(os.environ), dict(jax.config.values)
import fastkv_jax, kernels_pallas, sys
after = dict(os.environ), dict(jax.config.values)
changed = [sorted(k for k in b.keys() | a.keys() if b.get(k) != a.get(k)) for b, a in zip(before, after)]
heavy = sorted({"matplotlib", "torch", "transformers", "fastkv_jax.cli"} & set(sys.modules))
print(json.dumps([*changed, heavy, jax._src.xla_bridge.backends_are_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[], [], [], False]
