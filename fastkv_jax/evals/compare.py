"""Every method beside every other: needles found, perplexity after it, and what it costs.

Methods that only compress see the same prefill, so one pass serves them all; the others get a pass of their own.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fastkv_jax.buckets import pad_batch
from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.costs import full_cache_bytes, prefill_flops
from fastkv_jax.evals.running.memory_maps import forget_programs_if_many
from fastkv_jax.methods import ASL, METHODS, FullKV, Method
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.doors import prefill
from fastkv_jax.prefilling.likelihood import next_token_scores
from fastkv_jax.prefilling.many_methods import in_one_pass, prefill_all

SETTINGS = {"window_size": 16, "kernel_size": 21}  # of the methods that have them


class Question(NamedTuple):
    """A prompt that ends with the beginning of its answer, and the answer."""

    prompt: list[int]
    window_end: int
    answer: list[int]
    where: np.ndarray  # positions of the answer's tokens in the prompt


@dataclass
class Row:
    """One method at one budget."""

    name: str
    method: Method
    kv_dtype: str | None = None  # "int8" or "float8_e4m3fn"; None: the model's
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    kept: list[float] = field(default_factory=list)  # share of the answer's entries that stay
    nll: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)  # against full context
    bytes: list[float] = field(default_factory=list)


def methods_at(rate: float, num_layers: int) -> Iterator[tuple[str, Method]]:
    """Every method that keeps `rate` of the entries, by name."""
    for name, kind in METHODS.items():
        fields = {f.name for f in dataclasses.fields(kind)}
        if "retention_rate" not in fields:
            continue
        settings: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key in fields}
        settings |= {key: num_layers // 2 - 1 for key in ("tsp_layer", "filter_layer") if key in fields}
        if kind is ASL:
            settings |= {"tsp_rate": rate}
        elif "tsp_rate" in fields:
            settings |= {"tsp_rate": max(rate, 0.2)}  # the rows that go on must hold the budget
        yield name, kind(retention_rate=rate, **settings)


def compare(
    model: Llama,
    rows: Sequence[Row],
    questions: Mapping[str, Sequence[Question]],
    texts: Sequence[list[int]],
    columns: int,
    report: Callable[[], object] = lambda: None,
) -> None:
    """Fill the rows in. `texts` are cut after three quarters; the last one is scored after the rest was read."""
    for i in range(max(len(texts), *map(len, questions.values()))):  # in turn: what is done is even whenever it ends
        forget_programs_if_many()
        for kind, asked in questions.items():
            if i < len(asked):
                _ask(model, rows, kind, asked[i], columns)
                report()
        if i < len(texts):
            _read_on(model, rows, texts[i], columns)
            report()


def _read_on(model: Llama, rows: Sequence[Row], text: list[int], columns: int) -> None:
    cut = 3 * len(text) // 4
    for row, cache in _caches(model, rows, text[:cut], 0, columns):
        found, _ = next_token_scores(model, *pad_batch([text[cut:]]), cache=cache)
        row.nll.append(-float(found.sum()) / (len(text) - cut - 1))


def _ask(model: Llama, rows: Sequence[Row], kind: str, question: Question, columns: int) -> None:
    n, full = len(question.prompt), FullKV()
    for row, cache in _caches(model, rows, question.prompt, question.window_end, columns):
        row.right[kind].append(_says(model, cache, question))
        row.kept.append(_share_kept(cache, question.where))
        row.flops.append(prefill_flops(model.config, row.method, n) / prefill_flops(model.config, full, n))
        row.bytes.append(int(cache.entry_bytes()[0]) / full_cache_bytes(model.config, n, model.dtype.itemsize))


def _says(model: Llama, cache: KVCache, question: Question) -> bool:
    """Whether greedy decoding gives the answer; its first token follows the prompt's last, which is fed again."""
    fed = [question.prompt[-1], *question.answer]
    _, best = next_token_scores(model, *pad_batch([fed], 32), cache=_without_last(cache))
    return np.asarray(best)[0, -len(question.answer) :].tolist() == question.answer


def _without_last(cache: KVCache) -> KVCache:
    """The cache before its last token was read: the entries at that position are dropped."""
    last = cache.position - 1
    segments = []
    for s in cache.segments:
        positions = s.positions // max(s.sharing, 1)
        gone = positions == last[None, :, None, None]
        segments.append(dataclasses.replace(s, positions=jnp.where(gone, -1, s.positions)))
    return dataclasses.replace(cache, segments=tuple(segments), position=last)


def _share_kept(cache: KVCache, where: np.ndarray) -> float:
    """Of the answer's tokens, over all layers and heads."""
    found = [np.isin(where, head) for i in range(cache.num_layers) for head in np.asarray(cache.layer(i).positions[0])]
    return float(np.mean(found))


def _caches(
    model: Llama, rows: Sequence[Row], prompt: list[int], window_end: int, columns: int
) -> Iterator[tuple[Row, KVCache]]:
    tokens, start = pad_batch([prompt], columns)
    layers = model.config.num_layers
    by_method: dict[Method, list[Row]] = defaultdict(list)
    for row in rows:
        by_method[row.method].append(row)
    together = [method for method in by_method if in_one_pass(method, layers)]
    options: dict[str, Any] = {"max_new_tokens": 0, "window_end": window_end}
    read = prefill_all(model, tokens, start, methods=together, **options) if together else []
    found = dict(zip(together, read, strict=True))
    for method, mine in by_method.items():
        alone = method not in found
        cache = (prefill(model, tokens, start, method=method, **options) if alone else found.pop(method)).cache
        for row in mine:
            yield row, cache if row.kv_dtype is None else _in_8_bits(cache, row.kv_dtype)


def _in_8_bits(cache: KVCache, dtype: str) -> KVCache:
    """What prefill with this `kv_dtype` leaves: entries become small when all has been computed."""
    return dataclasses.replace(cache, segments=tuple(s.quantized(dtype) for s in cache.segments))
