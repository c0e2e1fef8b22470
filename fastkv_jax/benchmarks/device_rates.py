"""What a device can do, measured: bytes a copy moves, floating-point operations a matrix product makes, a second."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LEAST_S = 0.1  # of the calls that are subtracted: far above a clock's and a dispatch's noise
SIZES = {"cpu": (1 << 26, 2048)}  # numbers that are copied, and the side of the product
LARGE = (1 << 29, 8192)  # on the other platforms


@dataclass
class Case:
    """One operation on one shape."""

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
    copy = Case("copy", f"{many * dtype.itemsize >> 20} MiB", lambda x: -x,
                (jnp.zeros(many, dtype),), 2 * many * dtype.itemsize, 0)  # fmt: skip
    product = Case("product", f"{side} cubed", lambda a, b: a @ b,
                   (one, two), 3 * side**2 * dtype.itemsize, 2 * side**3)  # fmt: skip
    return copy, product


def timer(case: Case) -> Callable[[], None]:
    """Compile a case; each call of the result adds a measurement to it.

    Seconds of one run: what 4n more runs in one program take, divided by 4n. Each run's arguments depend on the one
    before, so that nothing can leave the loop.
    """
    import jax
    from jax import lax

    @jax.jit
    def program(times, *args):
        def again(_, carry):
            args, out = carry
            nothing = jax.tree.leaves(out)[0].ravel()[0] * 0
            touch = lambda a: a.at[(0,) * a.ndim].add(nothing.astype(a.dtype))  # noqa: E731 - in place
            args = tuple(map(touch, args))
            return args, case.run(*args)

        return lax.fori_loop(0, times, again, (args, case.run(*args)))[1]

    def took(times: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(times, *case.args))
        return time.perf_counter() - began

    took(0)  # compiles
    times = 1
    while took(times) < LEAST_S:
        times *= 2
    return lambda: case.seconds.append((took(5 * times) - took(times)) / (4 * times))


def rates(copy: Case, product: Case) -> dict[str, float]:
    """By the medians of both."""
    return {
        "copy_bytes_per_s": copy.bytes / statistics.median(copy.seconds),
        "product_flops_per_s": product.flops / statistics.median(product.seconds),
    }
