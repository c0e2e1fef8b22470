"""The platform's attention over a prompt: ragged rows, numbers in the padding, and padding that stays finite.

What a padding row holds must not reach the prompt; and what it becomes must be finite, as the layers above multiply it
by 0. NaN itself is not tried: 0 * NaN is NaN on every platform, which is why padding must never become it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastkv_jax.device_checks.kernels.inputs import Drawn, theirs
from fastkv_jax.device_checks.results import WRONG, Check, Outcome, within
from fastkv_jax.device_checks.tolerances import OF_DTYPE, apart
from fastkv_jax.model.attention import attention

MOST_ROWS = 256  # queries that are compared, spread over a prompt: with all, the map would be T x T


class Case(NamedTuple):
    """Shapes, and what stands in the padding."""

    rows: int
    kv_heads: int
    group: int
    tokens: int
    dim: int
    dtype: str
    poison: float = 0.0  # 0: numbers like the others

    @property
    def name(self) -> str:
        """As the table has it."""
        return (f"prefill attention B {self.rows}, K {self.kv_heads}, G {self.group}, T {self.tokens:,}, D {self.dim}, "
                f"{self.dtype}" + (f", padding {self.poison:g}" if self.poison else ""))  # fmt: skip


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """All of them, the most telling first."""
    return (Check(case.name, partial(_run, case, platform)) for case in cases(platform, quick))


def cases(platform: str, quick: bool) -> list[Case]:
    """Head sizes, groups, dtypes; lengths one below, at and one above a block of 512."""
    small = platform == "cpu"
    long, half = (700, "bfloat16") if small else (32_768, "bfloat16")
    found = [Case(2, 2, 4, long // 8 * 4, 128, half, 1e4), Case(2, 3, 3, 333, 64, "float32")]
    if not quick:
        found += [
            Case(1, 2 if small else 8, 4, long, 128, half),
            Case(2, 2, 1, 333, 16, half, 1e3),
            Case(2, 2, 8, 1000, 80, half),
            *[Case(2, 2, 4, edge, 128, half, 1e4) for edge in (511, 512, 513)],
            Case(2, 2, 2, 333, 16, "float32", 1e4),
        ]
        found += [Case(2, 2, 4, long // 8, 128, "float16")] * (platform != "tpu")
    return found


def _run(case: Case, platform: Any) -> Outcome:
    drawn, n = Drawn(case.name), case.tokens
    heads = (case.kv_heads * case.group, case.kv_heads, case.kv_heads)
    q, k, v = (drawn.normal(case.rows, h, n, case.dim, dtype=case.dtype) for h in heads)
    start = np.array([0, n // 3], np.int32)[: case.rows]
    if case.poison:
        for row, first in enumerate(start):
            for x in (q, k, v):
                x[row, :, :first] = case.poison
    precision = "highest" if case.dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        mine = np.asarray(jax.jit(partial(attention, platform=platform))(q, k, v, start))
    looked_at = np.unique(np.linspace(0, n - 1, min(n, MOST_ROWS), dtype=np.int32))
    exact = theirs(_plain, q[:, :, looked_at], k, v, start, looked_at)
    real = (looked_at >= start[:, None])[:, None, :, None]
    outcome = within(apart(np.where(real, mine[:, :, looked_at], 0), np.where(real, exact, 0)), OF_DTYPE[case.dtype])
    if np.isfinite(np.asarray(mine, np.float32)).all():
        return outcome
    return Outcome(WRONG, f"{outcome.found}; rows that are not finite", outcome.numbers)


def _plain(q, k, v, start, rows):
    """Attention of the queries [B, H, R, D] at columns `rows`, as it is defined; rows before `start` are noise."""
    batch, heads, count, dim = q.shape
    columns = jnp.arange(k.shape[2])
    seen = (columns[None, None] <= rows[None, :, None]) & (columns[None, None] >= start[:, None, None])
    logits = jnp.einsum("bkgrd,bktd->bkgrt", q.reshape(batch, k.shape[1], -1, count, dim), k) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30), axis=-1)
    return jnp.einsum("bkgrt,bktd->bkgrd", weights, v).reshape(batch, heads, count, dim)
