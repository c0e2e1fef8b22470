"""Step `model-speed`: a model with random weights, full context against FastKV with the paper's settings."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastkv_jax import costs
from fastkv_jax.benchmarks import shapes
from fastkv_jax.benchmarks.race import Series, costs_of, timed
from fastkv_jax.device_checks.device import need
from fastkv_jax.device_checks.results import Check, Outcome, measured
from fastkv_jax.device_checks.speed import device
from fastkv_jax.methods import FullKV, Method, presets
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.llama import Llama

NEW, REPEATS = 64, 1  # after a warm-up
WORKING = 6e9  # bytes beside weights and cache that a prefill of 131,072 tokens takes, about; docs/kernels.md


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """Llama-3.1-8B at two lengths; quick: Llama-3.2-1B at one; on a CPU two layers of nothing much."""
    name, lengths = {"cpu": ("tiny", [256, 512])}.get(platform, ("llama-3.1-8b", [32_768, 131_072]))
    if quick:
        name, lengths = name.replace("llama-3.1-8b", "llama-3.2-1b"), lengths[:1]
    done: dict[tuple[int, str], Series] = {}
    for tokens in lengths:
        for method in ("full", "fastkv"):
            yield Check(f"{name}, {tokens:,} tokens, {method}", partial(_time, platform, name, tokens, method, done))


@cache
def _model(name: str, dtype: Any) -> Llama:
    config = shapes.config(name, 1 << 18)
    return jax.block_until_ready(jax.jit(lambda: Llama(config, nnx.Rngs(0), dtype))())


def _drawing(config: LlamaConfig) -> int:
    """Bytes that the generator takes while it draws the largest matrix, of all layers together."""
    return 8 * config.num_layers * config.intermediate_size * config.hidden_size


def _method(name: str, num_layers: int) -> Method:
    return FullKV() if name == "full" else presets.build(name, presets.load("paper"), {}, num_layers)


def _time(platform: str, name: str, tokens: int, method_name: str, done: dict[tuple[int, str], Series]) -> Outcome:
    config, dtype = shapes.config(name, 1 << 18), jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    method = _method(method_name, config.num_layers)
    cache_size = costs.cache_bytes(config, method, tokens, NEW, dtype.itemsize)
    weights = costs.weight_count(config) * dtype.itemsize
    need(weights + max(cache_size + WORKING * tokens / 131_072, _drawing(config)))
    able = device(platform)
    model = _model(name, dtype)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens), dtype=np.int32)
    series = Series(method_name, tokens, *costs_of(model, method, tokens, 1))
    for turn in range(REPEATS + 1):
        timing = timed(model, prompts, method, NEW)
        if turn:
            series.add(timing)
    done[tokens, method_name] = series
    full = done.get((tokens, "full"), series)
    row = series.row(full, able)
    found = (f"prefill {row['prefill_s']:.3g} s, {row['share_of_product']:.0%} of the product; "
             f"decode {1e3 * row['decode_s']:.3g} ms a token, {row['share_of_copy']:.0%} of the copy")  # fmt: skip
    if full is not series:
        found += (f"; {row['prefill_speedup']:.2f} and {row['decode_speedup']:.2f} times faster than full context, "
                  f"of {row['prefill_limit']:.2f} and {row['decode_limit']:.2f}")  # fmt: skip
    return measured(found, **row)
