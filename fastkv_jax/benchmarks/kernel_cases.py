"""Each kernel in the shape of a layer of Llama-3.1-8B: 32 query heads, 8 KV heads, head size 128."""

from typing import Any

import jax
import jax.numpy as jnp

import kernels_pallas
from fastkv_jax.benchmarks.device_rates import Case, yardsticks
from fastkv_jax.model.attention import attention
from kernels_pallas import Slots

HEADS, KV_HEADS, DIM, WINDOW = 32, 8, 128, 8


def cases(platform: Any, kernels: Any, tokens: list[int], slots: list[int], rows: int) -> list[Case]:
    """The two yardsticks, copy and product, then the operations."""
    dtype = jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    small = platform == "cpu"
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    normal = lambda *shape: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
    found = [*yardsticks(platform)]
    zeros = lambda n: jnp.zeros(n, jnp.int32)  # noqa: E731
    for t in tokens:
        q, k = normal(1, HEADS, WINDOW, DIM), normal(1, KV_HEADS, t, DIM)

        def scores(q, k, t=t):
            return kernels_pallas.window_scores(
                q, k, zeros(1), zeros(1) + t, kernel_size=7, pooling="avg",
                implementation=kernels,
            )  # fmt: skip

        moved = k.nbytes + q.nbytes + 4 * KV_HEADS * t
        found.append(Case("window_scores", f"K {KV_HEADS}, T {t:,}", scores, (q, k), moved, 4 * q.size * t))
        capacity = -(-t // 10 // 128) * 128

        def select(scores, capacity=capacity, t=t):
            count = jnp.full((1, KV_HEADS), t // 10, jnp.int32)
            return kernels_pallas.select(scores, count, capacity, implementation=kernels)

        given = jax.random.uniform(next(keys), (1, KV_HEADS, t))
        moved = given.nbytes + 4 * KV_HEADS * capacity
        found.append(Case("select", f"K {KV_HEADS}, T {t:,}, C {capacity:,}", select, (given,), moved, 0))
    for c in slots:
        for kind in (dtype.name, "int8", "float8_e4m3fn"):
            k, v = normal(rows, KV_HEADS, c, DIM), normal(rows, KV_HEADS, c, DIM)
            scales: tuple[Any, ...] = ()
            if kind != dtype.name:
                (k, k_scale), (v, v_scale) = kernels_pallas.quantize(k, kind), kernels_pallas.quantize(v, kind)
                scales = (k_scale, v_scale)
            q, new = normal(rows, HEADS, DIM), normal(rows, KV_HEADS, 128, DIM)
            positions = jnp.broadcast_to(jnp.arange(c), (rows, KV_HEADS, c))

            def decode(q, k, v, positions, new, *scales):
                filled = jnp.full(q.shape[0], 64, jnp.int32)
                prompt = Slots(k, v, positions, None, *scales)
                return kernels_pallas.decode_attention(q, prompt, Slots(new, new), filled, implementation=kernels)

            args = (q, k, v, positions, new, *scales)
            moved = sum(a.nbytes for a in (k, v, positions, *scales)) + new.nbytes
            shape = f"B·K {rows * KV_HEADS}, C {c:,}, {kind}"
            found.append(Case("decode_attention", shape, decode, args, moved, 4 * rows * HEADS * c * DIM))
    t = min(4096 if small else 32_768, max(tokens))
    q, k, v = normal(1, HEADS, t, DIM), normal(1, KV_HEADS, t, DIM), normal(1, KV_HEADS, t, DIM)

    def whole(q, k, v):
        return attention(q, k, v, zeros(1), platform=platform)

    moved = 2 * (q.nbytes + k.nbytes)
    found.append(Case("prefill attention", f"H {HEADS}, T {t:,}", whole, (q, k, v), moved, 2 * HEADS * DIM * t * t))
    return found
