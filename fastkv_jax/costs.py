"""What a prompt costs, from shapes alone: floating-point operations of a prefill, bytes of a cache."""

import numpy as np

from fastkv_jax.config import LlamaConfig
from fastkv_jax.methods.base import Method
from fastkv_jax.methods.plan import check_plan


def layer_flops(config: LlamaConfig, tokens: int) -> float:
    """One layer over `tokens` rows: its matrix products, and attention over the causal half. Norms are not counted."""
    c = config
    projections = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    weights = projections + 3 * c.hidden_size * c.intermediate_size
    attention = 2 * c.num_heads * c.head_dim * tokens * (tokens + 1)  # q k and the mix of v, 2 each, half of the square
    return 2.0 * weights * tokens + attention


def prefill_flops(config: LlamaConfig, method: Method, n: int) -> float:
    """A prompt of n tokens under a method, the language-model head of its last row included."""
    plan = check_plan(method.plan(np.array([n]), config.num_layers), config.num_layers)
    layers = sum((run.stop - run.first) * layer_flops(config, int(run.tokens[0])) for run in plan)
    return layers + 2.0 * config.hidden_size * config.vocab_size


def decode_flops(config: LlamaConfig, entries_seen: int) -> float:
    """One token: all matrix products, the language-model head, and attention to `entries_seen` slots over all heads."""
    c = config
    projections = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    weights = c.num_layers * (projections + 3 * c.hidden_size * c.intermediate_size) + c.hidden_size * c.vocab_size
    return 2.0 * weights + 4.0 * c.head_dim * entries_seen
