"""Compiles every kernel for a TPU that need not be there: python compile_for_tpu.py v5e:2x2

One JSON line for each program: {program, calls, sorts, seconds, arguments, temporaries}, the last two in bytes.
Needs libtpu (jax[tpu]) and the environment that conftest.py sets.
"""

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kernels_pallas
from kernels_pallas import Slots

CAPACITY = 12_544  # 12.5k, up to the next multiple of 128: other capacities make XLA lay out, and copy, the cache anew
Program = tuple[str, Callable, tuple]  # name, function, the shapes of its arguments


def array(shape: tuple[int, ...], dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def scores(heads: int, kv_heads: int, window: int, tokens: int, dim: int, dtype=jnp.bfloat16, kernel_size=7) -> Program:
    run = functools.partial(kernels_pallas.window_scores, kernel_size=kernel_size, pooling="max", implementation="tpu")
    q, k = array((1, heads, window, dim), dtype), array((1, kv_heads, tokens, dim), dtype)
    name = f"window_scores H={heads} K={kv_heads} W={window} T={tokens} D={dim} {dtype.__name__}"
    return name, run, (q, k, array((1,)), array((1,)))


def choice(rows: int, tokens: int, capacity: int) -> Iterator[Program]:
    arrays = array((1, rows, tokens), jnp.float32), array((1, rows))
    run = functools.partial(kernels_pallas.select, capacity=capacity, implementation="tpu")
    yield f"select K={rows} T={tokens} C={capacity}", run, arrays
    mark = functools.partial(kernels_pallas.among_best, implementation="tpu")
    yield f"among_best K={rows} T={tokens}", mark, arrays


def attention(
    heads: int, kv_heads: int, cache_heads: int, capacity: int, dim: int, dtype=jnp.bfloat16, cache=None, flat=False
) -> Program:
    cache = cache or dtype
    slots = 1, cache_heads, capacity
    entries, decoded = array((*slots, dim), cache), array((1, kv_heads, 256, dim), dtype)
    scale = array(slots, jnp.bfloat16) if jnp.dtype(cache).itemsize == 1 else None
    prompt = Slots(entries, entries, array(slots), array(slots) if flat else None, scale, scale)
    given = array((1, heads, dim), dtype), prompt, Slots(decoded, decoded), array((1,))
    run = functools.partial(kernels_pallas.decode_attention, implementation="tpu")
    name = f"decode_attention H={heads} K={kv_heads} N={cache_heads} C={capacity} D={dim} {cache.__name__}"
    return name, run, given


def programs() -> Iterator[Program]:
    for heads, kv_heads in ((32, 8), (4, 1)):  # Llama-3.1-8B, and an eighth of it
        for tokens in (32_768, 131_072):
            yield scores(heads, kv_heads, 8, tokens, 128)
            yield from choice(kv_heads, tokens, CAPACITY)
        for cache in (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
            yield attention(heads, kv_heads, kv_heads, CAPACITY, 128, cache=cache)
    yield attention(32, 8, 32, CAPACITY, 128)  # a cache per query head
    yield attention(32, 8, 1, 8 * CAPACITY, 128, cache=jnp.int8, flat=True)
    yield scores(9, 3, 16, 8192, 64, kernel_size=21)  # SmolLM2
    yield from choice(3, 8192, 1664)
    for cache in (jnp.bfloat16, jnp.int8):
        yield attention(9, 3, 3, 1664, 64, cache=cache)
    yield scores(8, 1, 64, 131_072, 256, jnp.float32)  # the logits do not fit: two sweeps
    yield scores(4, 2, 3, 5000, 80, kernel_size=63)  # odd sizes
    yield attention(8, 8, 8, 300, 80, jnp.float32)
    yield attention(4, 2, 2, 0, 256)


def main(target: str) -> None:
    devices = topologies.get_topology_desc(topology_name=target, platform="tpu").devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("chip",)), PartitionSpec())
    for name, run, given in programs():
        there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), given)
        lowered = jax.jit(run).lower(*there)
        begun = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - begun
        text, memory = compiled.as_text(), compiled.memory_analysis()
        found = {
            "program": name,
            "calls": re.findall(r'%(\w+)[.\d]* = .*custom_call_target="tpu_custom_call"', text),
            "sorts": len(re.findall(r" sort\(", text)),
            "seconds": round(seconds, 2),
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
