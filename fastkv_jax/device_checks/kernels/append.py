"""`append`: queries and keys rotated, one slot of one layer written, and no other number of the buffers."""

from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp
import numpy as np

import kernels_pallas
from fastkv_jax.device_checks.kernels.inputs import Drawn, choice, ours, theirs
from fastkv_jax.device_checks.results import Check, Outcome, within
from fastkv_jax.device_checks.tolerances import OF_DTYPE, apart


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """Head sizes, dtypes, and a slot that is not there."""
    cases = [(128, "bfloat16", 100), (64, "float32", 0)] + [(80, "bfloat16", 255), (16, "float32", 256)] * (not quick)
    for dim, dtype, used in cases:
        yield Check(f"append D {dim}, {dtype}, slot {used} of 256", partial(_run, dim, dtype, used, platform))


def _run(dim: int, dtype: str, used: int, platform: str) -> Outcome:
    drawn, kv_heads = Drawn(f"append {dim} {dtype}"), 2
    q, k, v = (drawn.normal(2, heads, dim, dtype=dtype) for heads in (8, kv_heads, kv_heads))
    angle = np.tile(drawn.random.normal(size=(2, dim // 2)), 2).astype(np.float32)
    buffers = tuple(drawn.normal(3, 2, kv_heads, 256, dim, dtype=dtype) for _ in range(2))

    def all_of(implementation, q, k, v, cos, sin, buffers):
        at = jnp.int32(used), jnp.int32(1)
        made = kernels_pallas.append(q, k, v, (cos, sin), buffers, *at, **implementation)
        return jnp.concatenate([a.reshape(-1, dim) for a in made])

    given = q, k, v, np.cos(angle), np.sin(angle), buffers
    mine = ours(partial(all_of, choice(platform)), platform, *given)
    return within(apart(mine, theirs(partial(all_of, {}), *given)), OF_DTYPE[dtype])
