"""A method of one's own needs no change to the package: a plan and a score, or a score alone."""

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import fastkv_jax as fk
from examples import LENGTHS, NEW, PROMPTS, filled, layers, model_a, ragged
from fastkv_jax import methods
from fastkv_jax.methods import Layer, Scores, Segment
from fastkv_jax.methods.compression import Compression


@dataclass(frozen=True, kw_only=True)
class EveryOther(Compression):
    """Keeps tokens at even positions before those at odd ones, the earliest first."""

    def importance(self, layer: Layer):
        """No attention is looked at."""
        odd = layer.positions % 2
        return jnp.broadcast_to(-(odd * 100_000 + layer.positions).astype(jnp.float32)[:, None], layer.k.shape[:3])


@dataclass(frozen=True)
class Halves:
    """From nothing but the protocol: after each of the first two layers the later half of the tokens goes on."""

    memory = 1

    def window(self, n: np.ndarray) -> np.ndarray:
        return np.zeros_like(n)

    def check(self, num_layers: int) -> None:
        assert num_layers > 2

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        half = (n + 1) // 2
        return Segment(0, 1, n, n), Segment(1, 2, half, half), Segment(2, num_layers, (half + 1) // 2, (half + 1) // 2)

    def scores(self, layer: Layer) -> Scores:
        recency = layer.positions.astype(jnp.float32)
        return Scores(recency, jnp.broadcast_to(recency[:, None], layer.k.shape[:3]))


def test_a_score_alone_makes_a_method():
    result = ragged(EveryOther(retention_rate=0.3, window_size=2))
    for row, n in enumerate(LENGTHS):
        kept = min(n, max(2, int(n * 0.3)))
        expected = sorted(sorted(range(max(n - 2, 0)), key=lambda p: (p % 2, p))[: max(kept - 2, 0)])
        expected += range(max(n - 2, 0), n)
        for entries in layers(result.cache):
            assert filled(entries.positions[row]).tolist() == [expected] * 2
    made = fk.generate(
        model_a(), *fk.pad_batch(PROMPTS), method=EveryOther(retention_rate=0.3), max_new_tokens=NEW, stop_tokens=()
    )
    assert made.tokens.shape == (len(PROMPTS), NEW)


def test_a_plan_and_a_score_make_a_method():
    result = ragged(Halves())
    entries = layers(result.cache)
    for row, n in enumerate(LENGTHS):
        half = (n + 1) // 2
        for layer, kept in enumerate((n, half, (half + 1) // 2, (half + 1) // 2)):
            assert filled(entries[layer].positions[row]).tolist() == [list(range(n - kept, n))] * 2
        assert filled(result.propagated[row][None]).tolist() == [list(range(n - (half + 1) // 2, n))]


def test_it_can_be_a_part_of_another():
    method = fk.FastKV(tsp_layer=1, tsp_rate=0.5, compression=EveryOther(retention_rate=0.25, window_size=2))
    positions = filled(layers(ragged(method).cache)[0].positions[5])
    assert (positions[:, :-8] % 2 == 0).all()
    chosen = fk.FastKV(tsp_layer=1, tsp_rate=0.4, selection=EveryOther(), retention_rate=0.2)
    propagated = filled(ragged(chosen).propagated[5][None])
    assert (propagated[:, :-8] % 2 == 0).all()


FOLDER = Path(inspect.getfile(methods)).parent
SHARED = {"__init__", "base", "plan", "budgets", "compression", "tsp", "attention_sums", "presets"}


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    source = path.read_text()
    documentation = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", [])
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                documentation |= set(range(value.lineno, value.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in documentation for i, line in lines)


FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_is_a_short_file(path: Path):
    assert code_lines(path) <= 60


NAMING = {"__init__", "calibrate", "compare"}


def test_no_other_file_names_a_method():
    """The registry apart: methods build on each other, the house on none of them."""
    names = [kind.__name__ for kind in fk.METHODS.values()]
    for path in FOLDER.parent.rglob("*.py"):
        if {FOLDER, FOLDER.parent / "calibration"} & set(path.parents) or path.stem in NAMING:
            continue  # the public names; FastKV is what calibration is for; every method beside every other
        used = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert used & set(names) <= {"FullKV"}, path  # which reads a question after a cache
