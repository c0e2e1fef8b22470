"""The pages say what is there: every link, path and name in them exists, and every public name has its place."""

import importlib
import re
from pathlib import Path

import pytest

import fastkv_jax as fk

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or leads to something from one."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@every_page
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@every_page
def test_paths_and_modules_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/])(?:fastkv_jax|kernels_pallas|scripts|tests|configs|docs)/[\w/.-]*\w", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = re.findall(r"\b(?:fastkv_jax|kernels_pallas)(?:\.\w+)+", text)
    assert [name for name in names if not exists(name.removesuffix(".py"))] == []
    assert [name for name in re.findall(r"\bfk\.(\w+)", text) if not hasattr(fk, name)] == []


def test_every_public_name_has_its_place_among_the_library():
    listed = re.findall(r"^::: fastkv_jax\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(fk.__all__) - {"METHODS"})
