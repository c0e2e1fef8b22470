"""An independent statement of the Llama family and of FastKV in float64 NumPy: slow, plain, one prompt at a time.

The tests compare the library with it; it shares no code with the library. It is itself checked against recorded runs of
the published FastKV code and of transformers (`test_oracle.py`).

Letters: H query heads, K KV heads, G = H/K, D head size, E hidden size, V vocabulary, n prompt length, S rows
propagated past the TSP layer, C entries kept, W window, m columns before the window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Weights = Mapping[str, np.ndarray]
Tokens = Sequence[int] | np.ndarray
Method = Literal["full"] | Mapping[str, Any]


@dataclass(frozen=True)
class OracleResult:
    """What a prefill leaves behind. Lists have one item per layer; positions are those of the prompt, ascending."""

    logits: np.ndarray  # [V], of the last token
    kept: list[np.ndarray]  # [K, C] int
    propagated: np.ndarray | None  # [S] int; None without a TSP step
    k: list[np.ndarray]  # [K, C, D] after rotation, in the order of `kept`
    v: list[np.ndarray]  # [K, C, D]


def oracle_forward(
    weights: Weights, config: Mapping[str, Any], tokens: Tokens, *, method: Method, window_end: int = 0
) -> OracleResult:
    """Prefill `tokens`.

    `weights` and `config` are a checkpoint's: names as in Hugging Face's files, config.json in either spelling.
    `method` is "full" or FastKV's settings: tsp_layer; tsp_rate or tsp_length; retention_rate or capacity; window_size,
    kernel_size, pooling ("max" or "avg"); reference (True: as the published code behaves, default False).
    The observation window is the `window_size` rows that end `window_end` rows before the prompt's end.
    """
    model = _Model(weights, config)
    plan = _plan(method, len(tokens), window_end, model.layers)
    x, positions, propagated = model.embed(tokens), np.arange(len(tokens)), None
    kept, keys, values = [], [], []
    for i in range(model.layers):
        q, k, v = model.qkv(i, x, positions)
        attended = _attend(q, k, v)
        rows = _choose(_head_scores(q, k, plan, groups=len(k)), plan.kept(i), len(x), plan.tail)
        kept.append(positions[rows])
        keys.append(np.take_along_axis(k, rows[..., None], axis=1))
        values.append(np.take_along_axis(v, rows[..., None], axis=1))
        x = model.output(i, x, attended)
        if i == plan.tsp_layer and plan.propagated is not None:
            rows = _choose(_head_scores(q, k, plan, groups=1), plan.propagated, len(x), plan.tail)[0]
            x, positions = x[rows], positions[rows]
            propagated = positions
    return OracleResult(model.logits(x[-1]), kept, propagated, keys, values)


def oracle_generate(
    weights: Weights,
    config: Mapping[str, Any],
    tokens: Tokens,
    steps: int,
    *,
    method: Method,
    window_end: int = 0,
) -> tuple[list[int], np.ndarray]:
    """`steps` greedy tokens after `tokens`, and the logits [steps, V] they come from.

    New tokens take their true positions n, n + 1, ...; they see every kept entry and each other, and none is evicted.
    """
    result = oracle_forward(weights, config, tokens, method=method, window_end=window_end)
    model = _Model(weights, config)
    keys, values, logits = list(result.k), list(result.v), [result.logits]
    for step in range(steps - 1):
        x = model.embed([int(np.argmax(logits[-1]))])
        for i in range(model.layers):
            q, k, v = model.qkv(i, x, np.array([len(tokens) + step]))
            keys[i], values[i] = np.concatenate([keys[i], k], axis=1), np.concatenate([values[i], v], axis=1)
            x = model.output(i, x, _attend(q, keys[i], values[i]))
        logits.append(model.logits(x[-1]))
    return [int(np.argmax(row)) for row in logits], np.stack(logits)


# ---------------------------------------------------------------------------------------------------------------- plan


class _Plan(NamedTuple):
    """How many rows stay where. `tail` is the window and the rows after it: always kept, always propagated."""

    tsp_layer: int
    before: int  # entries kept up to the TSP layer
    propagated: int | None  # rows that go on after it; None: all of them, without a choice
    after: int  # entries kept after it
    tail: int
    window: int
    kernel: int
    pooling: str

    def kept(self, layer: int) -> int:
        return self.before if layer <= self.tsp_layer else self.after


def _plan(method: Method, n: int, window_end: int, layers: int) -> _Plan:
    if method == "full":
        return _Plan(layers, n, None, n, tail=n, window=0, kernel=1, pooling="max")
    assert not isinstance(method, str), method
    tail = method["window_size"] + window_end
    budgets = _reference_budgets if method.get("reference") else _budgets
    counts = budgets(
        n, tail, method.get("tsp_rate"), method.get("tsp_length"), method.get("retention_rate"), method.get("capacity")
    )
    if method.get("reference") and (window_end or min(c for c in counts if c is not None) < min(n, tail)):
        raise ValueError("the published code knows no window_end and fails on a budget smaller than the window")
    return _Plan(
        method["tsp_layer"],
        *counts,
        tail=tail,
        window=method["window_size"],
        kernel=method["kernel_size"],
        pooling=method["pooling"],
    )


def _budgets(
    n: int, tail: int, rate: float | None, length: int | None, retention: float | None, capacity: int | None
) -> tuple[int, int | None, int]:
    """Exact budgets (before, propagated, after); each at least the tail, none more than there are rows."""
    rows = int(n * rate) if rate is not None else length
    before = int(n * retention) if retention is not None else capacity
    assert rows is not None and before is not None
    after = before
    if retention is not None and rate is not None:
        after = int(rows * (retention / rate))
    propagated = min(n, max(tail, rows))
    return min(n, max(tail, before)), propagated, min(propagated, max(tail, after))


def _reference_budgets(
    n: int, tail: int, rate: float | None, length: int | None, retention: float | None, capacity: int | None
) -> tuple[int, int | None, int]:
    """The published code's budgets: a layer with fewer rows than its capacity keeps all and propagates all."""
    rows = int(n * rate) if rate is not None else length
    before = int(n * retention) if retention is not None else capacity
    assert rows is not None and before is not None
    propagated = rows if n >= before and n > rows else None
    entering = n if propagated is None else propagated
    after = before
    if retention is not None:
        if rate is None:
            raise ValueError("the published code has no retention_rate together with tsp_length")
        after = int(entering * (retention / rate))
    return min(n, before), propagated, min(entering, after)


# ----------------------------------------------------------------------------------------------------------- selection


def _head_scores(q: np.ndarray, k: np.ndarray, plan: _Plan, groups: int) -> np.ndarray:
    """Scores [groups, m] of the m rows before the window: the attention they get from it, pooled, summed over heads.

    `groups` is K for one selection per KV head, 1 for one over all query heads.
    """
    rows = q.shape[1]
    first = max(0, rows - plan.tail)
    queries = np.arange(first, min(first + plan.window, rows))
    attention = _probabilities(q[:, queries], k, queries)
    pooled = _pool(attention.sum(axis=1)[:, :first], plan.kernel, plan.pooling)
    return pooled.reshape(groups, len(q) // groups, first).sum(axis=1)


def _pool(x: np.ndarray, kernel: int, pooling: str) -> np.ndarray:
    """Pool the last axis with stride 1 to the same length; zeros beyond the edges count in an average."""
    if x.shape[-1] == 0:
        return x
    left = kernel // 2
    fill = {"avg": 0.0, "max": -np.inf}[pooling]
    padded = np.pad(x, ((0, 0), (left, kernel - 1 - left)), constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=-1)
    return views.mean(axis=-1) if pooling == "avg" else views.max(axis=-1)


def _choose(scores: np.ndarray, count: int, rows: int, tail: int) -> np.ndarray:
    """Ascending rows [groups, count]: the last `tail`, and the best of the others; of equal scores the first wins."""
    tail = min(tail, rows)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, : count - tail]
    last = np.broadcast_to(np.arange(rows - tail, rows), (len(scores), tail))
    return np.sort(np.concatenate([best, last], axis=-1), axis=-1)


# --------------------------------------------------------------------------------------------------------------- model


class _Model:
    """A checkpoint's layers as functions of float64 rows [rows, E]."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]):
        self._weights = weights
        self._heads = config["num_attention_heads"]
        self._head_dim = config.get("head_dim") or config["hidden_size"] // self._heads
        self._eps = config["rms_norm_eps"]
        self._tied = config.get("tie_word_embeddings", False)
        self._frequencies = _frequencies(config, self._head_dim)
        self.layers = config["num_hidden_layers"]

    def embed(self, tokens: Tokens) -> np.ndarray:
        return self._get("model.embed_tokens.weight")[np.asarray(tokens)]

    def qkv(self, layer: int, x: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries [H, rows, D], keys and values [K, rows, D]; queries and keys normed if asked, then rotated."""
        x = self._norm(f"model.layers.{layer}.input_layernorm", x)
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (self._linear(f"{prefix}{name}_proj", x) for name in "qkv")
        q, k, v = (y.reshape(len(x), -1, self._head_dim).swapaxes(0, 1) for y in (q, k, v))
        if f"{prefix}q_norm.weight" in self._weights:
            q, k = self._norm(f"{prefix}q_norm", q), self._norm(f"{prefix}k_norm", k)
        angles = positions[:, None] * self._frequencies
        return _rotate(q, angles), _rotate(k, angles), v

    def output(self, layer: int, x: np.ndarray, attended: np.ndarray) -> np.ndarray:
        """The residual stream after the projection of `attended` [H, rows, D] and the MLP."""
        prefix = f"model.layers.{layer}."
        x = x + self._linear(f"{prefix}self_attn.o_proj", attended.swapaxes(0, 1).reshape(len(x), -1))
        y = self._norm(f"{prefix}post_attention_layernorm", x)
        gate = self._linear(f"{prefix}mlp.gate_proj", y)
        gated = gate / (1 + np.exp(-gate)) * self._linear(f"{prefix}mlp.up_proj", y)
        return x + self._linear(f"{prefix}mlp.down_proj", gated)

    def logits(self, x: np.ndarray) -> np.ndarray:
        head = "model.embed_tokens.weight" if self._tied else "lm_head.weight"
        return self._get(head) @ self._norm("model.norm", x)

    def _get(self, name: str) -> np.ndarray:
        return np.asarray(self._weights[name]).astype(np.float64)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._get(f"{name}.weight") * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self._eps)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self._get(f"{name}.weight").T
        return y + self._get(f"{name}.bias") if f"{name}.bias" in self._weights else y


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention [H, Q, D] of queries [H, Q, D] that are the last Q of the rows in k and v [K, rows, D]."""
    rows = np.arange(k.shape[1] - q.shape[1], k.shape[1])
    return _probabilities(q, k, rows) @ np.repeat(v, len(q) // len(v), axis=0)


def _probabilities(q: np.ndarray, k: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Softmax [H, Q, keys] of scaled products; the query of row r sees the keys of rows 0..r."""
    logits = q @ np.repeat(k, len(q) // len(k), axis=0).swapaxes(1, 2) / math.sqrt(q.shape[-1])
    logits = np.where(np.arange(k.shape[1]) <= rows[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate pair (i, i + D/2) of each row of x [heads, rows, D] by angles [rows, D/2]."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def _frequencies(config: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Radians per position [D/2], with Llama 3.1's stretching of long wavelengths where the config asks for it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.get("rope_type", "default") == "default":
        return frequencies
    assert rope["rope_type"] == "llama3", rope
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)  # within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor
