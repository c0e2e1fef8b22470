"""Contestants take turns, so that a slow minute hits all alike; medians are compared."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from fastkv_jax import buckets, costs
from fastkv_jax.decoding import loop
from fastkv_jax.methods.plan import effective_budgets
from fastkv_jax.prefilling import doors


class Timing(NamedTuple):
    """Seconds of one run."""

    prefill: float
    decode: float  # of a token, after the first few
    whole: float  # from the prompt to the last token
    logits: np.ndarray  # [B, V] of the last tokens


@dataclass
class Series:
    """The repeated runs of one contestant at one length, the warm-up left out."""

    name: str
    tokens: int
    flops: float  # of a prefill
    step_bytes: float  # that a decode step reads
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    scoring: list[float] = field(default_factory=list)  # and selection, alone

    def add(self, timing: Timing) -> None:
        """One more run."""
        self.prefill.append(timing.prefill)
        self.decode.append(timing.decode)
        self.whole.append(timing.whole)

    def row(self, full: "Series", device: dict[str, float]) -> dict[str, Any]:
        """Medians, ranges, how many times faster than full context, and shares of what the device can do, if known."""
        found: dict[str, Any] = {"tokens": self.tokens, "name": self.name}
        for name in ("prefill", "decode", "whole"):
            mine, theirs = getattr(self, name), getattr(full, name)
            found[f"{name}_s"] = statistics.median(mine)
            found[f"{name}_range_s"] = [min(mine), max(mine)]
            found[f"{name}_speedup"] = statistics.median(theirs) / statistics.median(mine)
        if self.scoring:
            found["scoring_share"] = statistics.median(self.scoring) / found["prefill_s"]
        found["prefill_limit"] = full.flops / self.flops
        found["decode_limit"] = full.step_bytes / self.step_bytes
        if device:
            found["share_of_product"] = self.flops / found["prefill_s"] / device["product_flops_per_s"]
            found["share_of_copy"] = self.step_bytes / found["decode_s"] / device["copy_bytes_per_s"]
        return found


def costs_of(model, method, tokens: int, batch: int) -> tuple[float, float]:
    """(operations of a prefill, bytes a decode step reads: weights and entries, each once)."""
    c = model.config
    weights = sum(a.nbytes for a in jax.tree.leaves(model))
    if not c.tie_word_embeddings:
        weights -= model.embedding[...].nbytes  # one row of it
    kept = sum((run.last - run.first + 1) * run.kept for run in effective_budgets(method, tokens, 0, c.num_layers))
    entries = costs.entry_bytes(c, kept, model.dtype.itemsize)
    return batch * costs.prefill_flops(c, method, tokens), weights + batch * entries


def timed(model, prompts: np.ndarray, method, new_tokens: int) -> Timing:
    """A run of ours; the first chunk of decoding does not count as decoding."""
    tokens, start = buckets.pad_batch(list(prompts))
    began = time.perf_counter()
    result = doors.prefill(model, tokens, start, method=method, max_new_tokens=new_tokens)
    jax.block_until_ready(result)
    prefill = time.perf_counter() - began
    logits = np.asarray(result.logits)
    made, since, decode_began = 0, 0, 0.0
    for chunk, _ in loop.decode_chunks(model, result, max_new_tokens=new_tokens, stop_tokens=()):
        made += chunk.shape[1]
        if not since and made > loop.CHUNK:
            since, decode_began = made, time.perf_counter()
    ended = time.perf_counter()
    return Timing(prefill, (ended - decode_began) / (made - since), ended - began, logits)


def race(
    runs: dict[str, Callable[[], Timing]],
    series: dict[str, Series],
    scorers: dict[str, Callable[[], float]],
    measures: list[Callable[[], None]],
    repeats: int,
    report: Callable[[str, str], object],
) -> dict[str, np.ndarray]:
    """One of each, then again: a warm-up and `repeats` rounds that count. `report` takes a line's kind and text.

    Returns the last tokens' logits of each.
    """
    logits: dict[str, np.ndarray] = {}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            timing = run()
            logits[name] = timing.logits
            report("round", f"{turn}{' (warm-up)' if turn == 0 else ''}  {name}  prefill {timing.prefill:.2f} s  "
                     f"decode {1e3 * timing.decode:.1f} ms/token  whole {timing.whole:.2f} s")  # fmt: skip
            if turn:
                series[name].add(timing)
        if turn:
            for name, seconds in scorers.items():
                series[name].scoring.append(seconds())
            for measure in measures:
                measure()
    return logits
