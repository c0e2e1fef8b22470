"""`decode_attention`: ragged heads, 8-bit, flat and per-query-head caches, with numbers in empty slots."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from fastkv_jax.benchmarks.kernel_cases import FLOAT8
from fastkv_jax.device_checks.kernels.inputs import Drawn, check_float8, choice, ours, theirs
from fastkv_jax.device_checks.results import Check, Outcome, within
from fastkv_jax.device_checks.tolerances import OF_DTYPE, apart
from kernels_pallas import Slots

NEW = 256  # slots of the buffer of new tokens, of which a row has used a part


class Case(NamedTuple):
    """Shapes, and what stands in the keys of empty slots; their values are 1e3, as NaN times a weight of 0 is NaN."""

    rows: int
    kv_heads: int
    group: int
    slots: int
    dim: int
    dtype: str
    cache: str = ""  # of 8 bits
    heads: str = ""  # "flat": one for all; "per query head"
    poison: float = 1e3

    @property
    def name(self) -> str:
        """As the table has it."""
        more = "".join(f", {word}" for word in (self.cache, self.heads) if word)
        return (f"decode_attention B {self.rows}, K {self.kv_heads}, G {self.group}, C {self.slots:,}, D {self.dim}, "
                f"{self.dtype}{more}, empty {self.poison:g}")  # fmt: skip


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """All of them, the most telling first."""
    return (Check(case.name, partial(_run, case, platform)) for case in cases(platform, quick))


def cases(platform: str, quick: bool) -> list[Case]:
    """Caches, head sizes, groups and dtypes; capacities one below, at and one above a tile."""
    small = platform == "cpu"
    long, heads = (130, 2) if small else (13_184, 8)
    half = "bfloat16"
    found = [
        Case(1, heads, 4, long, 128, half),
        Case(1, heads, 4, long, 128, half, "int8"),
        Case(2, heads, 4, long, 128, half, heads="flat"),
        Case(1, heads, 4, long, 128, half, FLOAT8),
        Case(2, 3, 3, long // 2, 64, "float32", poison=float("nan")),
    ]
    edges = [edge for tile in ((64,) if small else (128, 512, 1024)) for edge in (tile - 1, tile, tile + 1)]
    found += [Case(2, 2, 4, edge, 128, half, poison=1e4) for edge in (edges[:3:2] if quick else edges)]
    if not quick:
        found += [
            Case(2, 2, 1, 48, 16, half),
            Case(2, 2, 8, long // 4, 80, half, poison=float("nan")),
            Case(2, 2, 2, 48, 16, "float32"),
            Case(2, heads, 4, long // 4, 128, half, heads="per query head"),
            Case(2, 3, 3, long // 4, 64, half, "int8"),
            Case(2, heads, 4, long // 2, 128, half, "int8", "flat"),
            Case(1, heads, 4, long // 2, 128, "float32", "int8"),
            Case(3, heads, 4, long // 2, 128, "float32"),
        ]
        found += [Case(1, heads, 4, long // 2, 128, "float16", "int8")] * (platform != "tpu")
        found += [Case(2, heads, 4, long // 4, 128, "float16", poison=1e4)] * (platform != "tpu")
    return found


def _run(case: Case, platform: str) -> Outcome:
    """The last of two layers is read, of the new entries the first."""
    if case.cache == FLOAT8:
        check_float8(platform)
    given = *_inputs(case), (jnp.int32(1), jnp.int32(0))
    mine = ours(partial(kernels_pallas.decode_attention, **choice(platform)), platform, *given)
    mixed = "bfloat16" if case.cache and case.dtype == "float16" else case.dtype
    return within(apart(mine, theirs(kernels_pallas.decode_attention, *given)), OF_DTYPE[mixed])


def _inputs(case: Case) -> tuple[np.ndarray, Slots, Slots, np.ndarray]:
    """q [B, H, D], two layers of prompt and new entries, filled [B]; up to a third of a head's slots is empty."""
    drawn, heads = Drawn(case.name), case.kv_heads * case.group
    of_cache = {"flat": 1, "per query head": heads}.get(case.heads, case.kv_heads)
    shape = 2, case.rows, of_cache, case.slots
    q = drawn.normal(case.rows, heads, case.dim, dtype=case.dtype)
    k, v = (drawn.normal(*shape, case.dim, dtype=case.dtype) for _ in range(2))
    new = [drawn.normal(2, case.rows, case.kv_heads, NEW, case.dim, dtype=case.dtype) for _ in range(2)]
    filled = (np.arange(case.rows, dtype=np.int32) * 37) % NEW + 1
    empty = drawn.random.integers(0, max(case.slots // 3, 1), (*shape[:3], 1))
    slots = np.broadcast_to(np.arange(case.slots, dtype=np.int32), shape)
    positions = np.where(slots < empty, np.int32(-1), slots)
    owner = drawn.random.integers(0, case.kv_heads, shape).astype(np.int32) if case.heads == "flat" else None
    k[positions < 0], v[positions < 0] = case.poison, 1e3
    for row, used in enumerate(filled):
        for entries in new:
            entries[:, row, :, used:] = 1e3
    if not case.cache:
        return q, Slots(k, v, positions, owner), Slots(*new), filled
    with jax.default_matmul_precision("highest"):
        (k, k_scale), (v, v_scale) = (kernels_pallas.quantize(jnp.asarray(x), case.cache) for x in (k, v))
    return q, Slots(k, v, positions, owner, k_scale, v_scale), Slots(*new), filled
