"""Each kernel in the shape of a layer of Llama-3.1-8B: 32 query heads, 8 KV heads, head size 128.

Where an operation takes a stack of layers and the number of one, layers take turns, as in a decode step: no cache holds
them all. Keys are laid out as the product has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

import kernels_pallas
from fastkv_jax.benchmarks.device_rates import Case, yardsticks
from fastkv_jax.model.attention import attention
from kernels_pallas import Slots

FLOAT8 = "float8_e4m3fn"
HEADS, KV_HEADS, DIM, WINDOW, NEW = 32, 8, 128, 8, 128
MATRICES = ((4096, 4096), (4096, 14_336))  # wo and w_down, O x I
NORMED = {"projections": ((4096, 1024, 1024), 4096), "gated": ((14_336, 14_336), 4096)}  # heights and I
STACK = {"cpu": 1 << 27}  # bytes that layers in turn have at least: several times what a cache holds
LARGE_STACK = 1 << 29  # on the other platforms


def has_float8(platform: str) -> bool:
    """Whether the device has float8_e4m3fn: an NVIDIA GPU from compute capability 8.9 on."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    return platform != "gpu" or capability is None or float(capability) >= 8.9


def cases(platform: Any, kernels: Any, tokens: list[int], slots: list[int], rows: int) -> list[Case]:
    """The two yardsticks, copy and product, then the operations."""
    made = _Cases(platform, kernels, rows)
    found = [*yardsticks(platform)]
    for t in tokens:
        found += [made.window_scores(t), made.select(t)]
    kinds = [made.dtype.name, "int8", *[FLOAT8] * has_float8(platform)]
    for c in slots:
        found += [made.decode_attention(c, kind) for kind in kinds]
    found += [made.linear(out, inner) for out, inner in MATRICES]
    found += [made.normed(name, *sizes) for name, sizes in NORMED.items()]
    return [*found, made.prefill_attention(min(4096 if platform == "cpu" else 32_768, max(tokens)))]


@dataclass
class _Cases:
    platform: Any
    kernels: Any
    rows: int
    keys: Iterator[Any] = field(default_factory=lambda: iter(jax.random.split(jax.random.key(0), 1000)))

    @property
    def dtype(self) -> Any:
        return jnp.dtype("float32" if self.platform == "cpu" else "bfloat16")

    def normal(self, *shape: int) -> Any:
        return jax.random.normal(next(self.keys), shape, self.dtype)

    def stack(self, *layer: Any) -> tuple[int, Any]:
        """How many layers, at least two, and the arrays of one, so many times over."""
        layers = max(2, -(-STACK.get(self.platform, LARGE_STACK) // sum(a.nbytes for a in layer)))
        return layers, tuple(jnp.repeat(a[None], layers, axis=0) for a in layer)

    def window_scores(self, t: int) -> Case:
        """On a GPU keys lie as its attention has them, tokens first, and must be read twice (docs/kernels.md)."""
        tokens_first = self.kernels == "gpu"
        sweeps = 2 if tokens_first else 1
        q = self.normal(1, HEADS, WINDOW, DIM)
        k = self.normal(1, t, KV_HEADS, DIM) if tokens_first else self.normal(1, KV_HEADS, t, DIM)

        def run(_, q, k):
            k, start = k.swapaxes(1, 2) if tokens_first else k, jnp.zeros(1, jnp.int32)
            options: Any = {"kernel_size": 7, "pooling": "avg", "implementation": self.kernels}
            return kernels_pallas.window_scores(q, k, start, start + t, **options)

        moved = sweeps * k.nbytes + q.nbytes + 4 * KV_HEADS * t
        return Case("window_scores", f"K {KV_HEADS}, T {t:,}", run, (q, k), moved, sweeps * 2 * q.size * t)

    def select(self, t: int) -> Case:
        capacity = -(-t // 10 // 128) * 128
        count, scores = jnp.full((1, KV_HEADS), t // 10), jax.random.uniform(next(self.keys), (1, KV_HEADS, t))

        def run(_, count, scores):
            return kernels_pallas.select(scores, count, capacity, implementation=self.kernels)

        moved = scores.nbytes + 4 * KV_HEADS * capacity
        return Case("select", f"K {KV_HEADS}, T {t:,}, C {capacity:,}", run, (count, scores), moved, 0)

    def decode_attention(self, c: int, kind: str) -> Case:
        k, v = (self.normal(self.rows, KV_HEADS, c, DIM) for _ in range(2))
        positions, scales = jnp.broadcast_to(jnp.arange(c), (self.rows, KV_HEADS, c)), ()
        if kind != self.dtype.name:
            (k, k_scale), (v, v_scale) = kernels_pallas.quantize(k, kind), kernels_pallas.quantize(v, kind)
            scales = k_scale, v_scale
        q, new = self.normal(self.rows, HEADS, DIM), self.normal(self.rows, KV_HEADS, NEW, DIM)
        moved = sum(a.nbytes for a in (k, v, positions, *scales)) + new.nbytes
        layers, stacked = self.stack(k, v, positions, new, *scales)

        def run(turn, q, k, v, positions, new, *scales):
            filled, layer = jnp.full(q.shape[0], NEW // 2), turn % layers
            prompt, new = Slots(k, v, positions, None, *scales), Slots(new, new)
            both = layer, layer
            return kernels_pallas.decode_attention(q, prompt, new, filled, both, implementation=self.kernels)

        shape = f"B·K {self.rows * KV_HEADS}, C {c:,}, {kind}"
        return Case("decode_attention", shape, run, (q, *stacked), moved, 4 * q.size * c)

    def linear(self, out: int, inner: int) -> Case:
        x, weight = self.normal(self.rows, inner), self.normal(out, inner) / jnp.asarray(inner**0.5, self.dtype)
        layers, stacked = self.stack(weight)

        def run(turn, x, weight):
            return kernels_pallas.linear(x, weight, turn % layers, implementation=self.kernels)

        flops = 2 * self.rows * weight.size
        return Case("linear", f"B {self.rows}, {out:,} x {inner:,}", run, (x, *stacked), weight.nbytes, flops)

    def normed(self, name: str, heights: tuple[int, ...], inner: int) -> Case:
        """`projections` or `gated`: a norm, and matrices of these heights."""
        x, norm = self.normal(self.rows, inner), self.normal(inner)
        weights = [self.normal(out, inner) / jnp.asarray(inner**0.5, self.dtype) for out in heights]
        layers, (norms, *stacked) = self.stack(norm, *weights)

        def run(turn, x, norms, *stacked):
            norm, layer, kernels = kernels_pallas.Norm(norms, 1e-5), turn % layers, self.kernels
            if name == "gated":
                gate, up = stacked
                return kernels_pallas.gated(x, norm, gate, up, layer, implementation=kernels)
            made = kernels_pallas.projections(x, norm, stacked, layer, implementation=kernels)
            return jnp.concatenate(made, axis=1)

        size = sum(heights) * inner
        shape = f"B {self.rows}, {' + '.join(f'{out:,}' for out in heights)} x {inner:,}"
        return Case(name, shape, run, (x, norms, *stacked), size * self.dtype.itemsize, 2 * self.rows * size)

    def prefill_attention(self, t: int) -> Case:
        q, k, v = self.normal(1, HEADS, t, DIM), self.normal(1, KV_HEADS, t, DIM), self.normal(1, KV_HEADS, t, DIM)

        def run(_, q, k, v):
            return attention(q, k, v, jnp.zeros(1, jnp.int32), platform=self.platform)

        moved = 2 * (q.nbytes + k.nbytes)
        return Case("prefill attention", f"H {HEADS}, T {t:,}", run, (q, k, v), moved, 2 * HEADS * DIM * t * t)
