"""Step `offsets`: behind 2^31 elements a layer read in place from its stack is equal to the layer alone, bit by bit.

Memory is asked for first: what the device has no room for is said, not passed over. On a CPU the stacks are small.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from fastkv_jax.device_checks.device import need
from fastkv_jax.device_checks.kernels.inputs import choice, jit
from fastkv_jax.device_checks.results import Check, Outcome, equal
from kernels_pallas import Slots

HEADS, DIM, GROUP, NEW = 8, 128, 4, 128
SLACK = 1.15  # what a stack takes while it is made, beside itself


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """A cache in bfloat16, a stack of matrices, then 8 bits: up to 2^31 numbers, and beyond 2^32; the product cuts
    caches between the two, and the kernels refuse them."""
    small = platform == "cpu"
    layers, slots, out, inner = (4, 128, 64, 512) if small else (32, 131_072, 16_384, 4096)
    decode, wider = partial(_decode, platform, layers), slots + slots // 32
    stacks: list[tuple[str, int, Callable[[], Outcome]]] = [
        ("decode_attention bfloat16", layers * HEADS * slots * DIM, partial(decode, slots, "bfloat16")),
        ("linear bfloat16", 2 * layers * out * inner, partial(_linear, platform, 2 * layers, out, inner)),
        ("decode_attention int8", layers * HEADS * slots // 2 * DIM, partial(decode, slots // 2, "int8")),
        ("decode_attention int8", layers * HEADS * wider * DIM, partial(decode, wider, "int8")),
    ]
    for name, elements, run in stacks[:3] if small else stacks:
        yield Check(f"{name}, 2^{np.log2(elements):.3g} elements", run)


def _stack(layers: int, one: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[layers, ...] of random numbers, made a layer at a time: the generator's own numbers take 8 bytes each."""
    return jax.jit(partial(jax.lax.map, one))(jax.random.split(jax.random.key(3), layers))


def _alike(layers: int, read: Callable[[int], tuple[jax.Array, jax.Array]]) -> Outcome:
    """`read` gives a layer's result from the stack, and alone. The first, both sides of the middle, and the last."""
    chosen = (0, layers // 2 - 1, layers // 2, layers - 1)
    found = [(layer, *map(np.asarray, read(layer))) for layer in chosen]
    wrong = [layer for layer, whole, alone in found if not np.array_equal(whole, alone)]
    return equal(len(wrong), len(chosen), "layers", wrong_layers=wrong)


def _decode(platform: str, layers: int, slots: int, cache: str) -> Outcome:
    """One array is keys and values both, to be within less memory: each is read by an offset of its own."""
    shape = 1, HEADS, slots, DIM
    need(SLACK * layers * HEADS * slots * DIM * jnp.dtype(cache).itemsize)
    if cache == "int8":
        entries = _stack(layers, lambda key: jax.random.bits(key, shape, jnp.uint8).astype(jnp.int8))
        scale = jnp.full((layers, *shape[:3]), 0.01, jnp.bfloat16)
    else:
        entries, scale = _stack(layers, lambda key: jax.random.normal(key, shape, cache)), None
    keys = jax.random.split(jax.random.key(5), 2)
    q = jax.random.normal(keys[0], (1, HEADS * GROUP, DIM), jnp.bfloat16)
    new = jax.random.normal(keys[1], (layers, 1, HEADS, NEW, DIM), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (layers, *shape[:3]))
    prompt, filled = Slots(entries, entries, positions, None, scale, scale), jnp.ones(1, jnp.int32)
    run = jit(partial(kernels_pallas.decode_attention, **choice(platform)), platform)

    def read(layer: int) -> tuple[jax.Array, jax.Array]:
        alone: Any = jax.tree.map(lambda a: a[layer : layer + 1], (prompt, Slots(new, new)))
        here, first = jnp.int32(layer), jnp.int32(0)
        return run(q, prompt, Slots(new, new), filled, (here, here)), run(q, *alone, filled, (first, first))

    return _alike(layers, read)


def _linear(platform: str, layers: int, out: int, inner: int) -> Outcome:
    need(SLACK * layers * out * inner * 2)
    weight = _stack(layers, lambda key: jax.random.normal(key, (out, inner), jnp.bfloat16))
    x = jax.random.normal(jax.random.key(5), (1, inner), jnp.bfloat16)
    run = jit(partial(kernels_pallas.linear, **choice(platform)), platform)
    return _alike(layers, lambda i: (run(x, weight, jnp.int32(i)), run(x, weight[i : i + 1], jnp.int32(0))))
