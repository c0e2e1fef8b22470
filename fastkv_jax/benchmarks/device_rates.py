"""What a device can do, measured: bytes a copy moves, floating-point operations a matrix product makes, a second."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LEAST_S = 0.1  # that the turns take which are measured: far above a clock's and a dispatch's noise
NEVER = -128  # the first number of no result
FEW, FEWEST_MORE = 2, 4  # turns: of what is subtracted, and at least beyond it
SIZES = {"cpu": (1 << 26, 2048)}  # numbers that are copied, and the side of the product
LARGE = (1 << 29, 8192)  # on the other platforms


@dataclass
class Case:
    """One operation on one shape: run(turn, *args)."""

    name: str
    shape: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    bytes: float
    flops: float
    seconds: list[float] = field(default_factory=list)


def yardsticks(platform: str) -> tuple[Case, Case]:
    """A copy and a square product, in the platform's usual dtype."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    many, side = SIZES.get(platform, LARGE)
    one, two = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    two = two / jnp.asarray(side**0.5, dtype)
    copy = Case("copy", f"{many * dtype.itemsize >> 20} MiB", lambda _, x: -x,
                (jnp.zeros(many, dtype),), 2 * many * dtype.itemsize, 0)  # fmt: skip
    product = Case("product", f"{side} cubed", lambda _, a, b: a @ b,
                   (one, two), 3 * side**2 * dtype.itemsize, 2 * side**3)  # fmt: skip
    return copy, product


def program(case: Case, turns: int) -> Callable[..., Any]:
    """The operation so many times in one program, each turn after the one before.

    A barrier ties a turn's arguments to the last result, so that no compiler may take it out of the loop, while all
    stay where they are: nothing is copied or written but by the operation, and that in whole, as the result is handed
    on. The number of turns is known to the compiler, so that the host has no say in them either.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    barriers_hold = jax.default_backend() != "cpu"  # whose compiler removes them before it hoists; it fuses a sum

    def result(turn, *args):
        return jax.tree.leaves(case.run(turn, *args))[0]

    def again(turn, before, args):
        (first, last), (changed, *rest) = lax.optimization_barrier((before, args))
        if not barriers_hold:
            changed += (first == jnp.asarray(NEVER, first.dtype)).astype(changed.dtype)
        out = result(turn, changed, *rest)
        return first if barriers_hold else out[(0,) * out.ndim], out

    def repeated(*args):
        like = jax.eval_shape(result, jnp.int32(0), *args)
        nothing = jnp.zeros((), like.dtype), jnp.zeros(like.shape, like.dtype)
        return lax.fori_loop(0, turns, lambda turn, before: again(turn, before, args), nothing)[1]

    return jax.jit(repeated)


def timer(case: Case) -> Callable[[], None]:
    """Compile a case; each call of the result adds a measurement to it.

    Seconds of one turn: what many turns in one program take more than a few, divided by how many more.
    """
    import jax

    def took(run: Callable[..., Any]) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(*case.args))
        return time.perf_counter() - began

    few = program(case, FEW)
    took(few)  # compiles
    more = max(FEWEST_MORE, math.ceil(FEW * LEAST_S / took(few)))
    many = program(case, FEW + more)
    took(many)
    return lambda: case.seconds.append((took(many) - took(few)) / more)


def rates(copy: Case, product: Case) -> dict[str, float]:
    """By the medians of both."""
    return {
        "copy_bytes_per_s": copy.bytes / statistics.median(copy.seconds),
        "product_flops_per_s": product.flops / statistics.median(product.seconds),
    }
