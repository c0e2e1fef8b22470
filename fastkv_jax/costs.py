"""What a prompt costs, from shapes alone: floating-point operations of a prefill, bytes of weights and of a cache."""

import numpy as np

from fastkv_jax.buckets import TILE
from fastkv_jax.methods.base import Method
from fastkv_jax.methods.plan import check_plan, static_plan
from fastkv_jax.model.config import LlamaConfig


def _layer_matrices(config: LlamaConfig) -> int:
    """Numbers in the matrices of one layer."""
    c = config
    projections = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return projections + 3 * c.hidden_size * c.intermediate_size


def weight_count(config: LlamaConfig) -> int:
    """Parameters of a model; biases and norms within attention are not counted."""
    c, tables = config, 1 if config.tie_word_embeddings else 2
    layers = c.num_layers * (_layer_matrices(c) + 2 * c.hidden_size)
    return layers + tables * c.vocab_size * c.hidden_size + c.hidden_size


def layer_flops(config: LlamaConfig, tokens: int) -> float:
    """One layer over `tokens` rows: its matrix products, and attention over the causal half. Norms are not counted."""
    c = config
    attention = 2 * c.num_heads * c.head_dim * tokens * (tokens + 1)  # q k and the mix of v, 2 each, half of the square
    return 2.0 * _layer_matrices(c) * tokens + attention


def prefill_flops(config: LlamaConfig, method: Method, n: int) -> float:
    """A prompt of n tokens under a method, the language-model head of its last row included."""
    plan = check_plan(method.plan(np.array([n]), config.num_layers), config.num_layers)
    layers = sum((run.stop - run.first) * layer_flops(config, int(run.tokens[0])) for run in plan)
    return layers + 2.0 * config.hidden_size * config.vocab_size


def decode_flops(config: LlamaConfig, entries_seen: int) -> float:
    """One token: all matrix products, the language-model head, and attention to `entries_seen` slots over all heads."""
    c = config
    weights = c.num_layers * _layer_matrices(c) + c.hidden_size * c.vocab_size
    return 2.0 * weights + 4.0 * c.head_dim * entries_seen


def entry_bytes(config: LlamaConfig, entries: int, itemsize: int) -> int:
    """K and V of so many entries of every KV head of a layer, in numbers of `itemsize` bytes."""
    return 2 * entries * config.num_kv_heads * config.head_dim * itemsize


def full_cache_bytes(config: LlamaConfig, n: int, itemsize: int) -> int:
    """K and V of all of n tokens in all layers."""
    return entry_bytes(config, config.num_layers * n, itemsize)


def cache_bytes(config: LlamaConfig, method: Method, bucket: int, new: int, itemsize: int) -> int:
    """K and V of one prompt in this bucket under a method, empty slots and room for `new` tokens included."""
    c = config
    stages = static_plan(method, c.num_layers, c.num_kv_heads, bucket, 0, TILE)
    last_pass = stages[max(i for i, stage in enumerate(stages) if stage.first == 0) :]
    heads = [1 if stage.shared else c.num_kv_heads for stage in last_pass]
    slots = sum(
        (s.stop - s.first) * (s.capacity * n + c.num_kv_heads * new) for s, n in zip(last_pass, heads, strict=True)
    )
    return 2 * slots * c.head_dim * itemsize
