"""Prefill in chunks with eviction in the loop: at any time there are one chunk and what was kept of those before it.

    chunk 0 + question             keep the best of chunk 0, forget the question
    kept | chunk 1 + question      keep the best of chunk 1, ...
    kept | last chunk + question   the question is at its own place: logits, and the cache

The question, which is the method's observation window and what follows it, judges every chunk, from right behind it.
With `FullKV` nothing is lost and the result is that of one prefill. With any other method it is another approximation:
a chunk competes with itself alone, keeps the share that the whole prompt would, and sees of earlier chunks only what
was kept. One program reads all chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from fastkv_jax.buckets import TILE, round_up
from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.cache.segment import SegmentKV
from fastkv_jax.cache.select import choose
from fastkv_jax.methods.base import Layer, Method, Scores, Segment
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.layers import Prefill, Static
from fastkv_jax.prefilling.passes import run_jit, stages_of
from fastkv_jax.prefilling.prompt import Prompt


@dataclass(frozen=True)
class ChunkOf:
    """A method's budgets for a chunk and the question behind it: the shares that a prompt of `total` tokens has."""

    method: Method
    total: int
    question: int

    @property
    def memory(self) -> int:
        """The method's."""
        return self.method.memory

    def window(self, n: np.ndarray) -> np.ndarray:
        """The whole prompt's, as far as it fits."""
        return np.minimum(self.method.window(np.array([self.total])), n)

    def check(self, num_layers: int) -> None:
        """The method's."""
        self.method.check(num_layers)

    def plan(self, n: np.ndarray, num_layers: int) -> tuple[Segment, ...]:
        """The method's plan for the whole prompt, scaled; the question stays beside the chunk's share."""
        body, whole = np.maximum(n - self.question, 0), max(self.total - self.question, 1)

        def share(budget: int) -> np.ndarray:
            if not budget:
                return 0 * n
            return np.minimum(n, -(-body * max(budget - self.question, 0) // whole) + self.question)

        runs = self.method.plan(np.array([self.total]), num_layers)
        return tuple(run._replace(tokens=share(int(run.tokens[0])), kept=share(int(run.kept[0]))) for run in runs)

    def scores(self, layer: Layer) -> Scores:
        """The method's."""
        return self.method.scores(layer)


class Chunk(NamedTuple):
    """One turn of the loop."""

    prompt: Prompt
    before: np.ndarray  # [B] tokens of earlier chunks
    stop: np.ndarray  # [B] position behind the chunk's last token, where the question begins


@dataclass(frozen=True)
class Chunks:
    """A batch of prompts cut up; shapes are the same for every chunk."""

    model: Llama
    prompt: Prompt  # not traced
    static: Static  # of the prefill that was asked for
    size: int

    @cached_property
    def lengths(self) -> np.ndarray:
        """[B] tokens of each row."""
        return self.prompt.tokens.shape[1] - np.asarray(self.prompt.start)

    @cached_property
    def questions(self) -> np.ndarray:
        """[B] tokens that are read with every chunk, at least the last one."""
        window = self.static.method.window(self.lengths)
        return np.minimum(np.maximum(np.where(window > 0, window + self.prompt.window_end, 0), 1), self.lengths)

    @cached_property
    def columns(self) -> int:
        """Of a chunk and the question."""
        return round_up(self.size + int(self.questions.max()), TILE)

    @cached_property
    def count(self) -> int:
        """How many chunks the longest row has."""
        return max(-(-int((self.lengths - self.questions).max()) // self.size), 1)

    @cached_property
    def each(self) -> Static:
        """Of the program that reads a chunk."""
        method = ChunkOf(self.static.method, int(self.lengths.max()), int(self.questions.max()))
        return self.static._replace(method=method, max_new_tokens=0, extends=False)

    @cached_property
    def slots(self) -> list[int]:
        """Slots of each run of layers that hold what a chunk keeps without the question."""
        c, most = self.model.config, self.size + int(self.questions.max())
        always = int(self.questions.min()) if self.each.method.window(np.array([most]))[0] else 0
        first = self.chunk(0).prompt
        stages = [stage for stage in stages_of(self.model, first, self.each) if stage.first < stage.stop]
        return [
            max(int(stage.kept[:, most].max()) - always, 0) * (c.num_kv_heads if stage.shared else 1)
            for stage in stages
        ]

    def chunk(self, index: int) -> Chunk:
        """Chunk `index`; rows end together, so that short ones have nothing in the first chunks."""
        body = self.lengths - self.questions
        stop = np.maximum(body - (self.count - 1 - index) * self.size, 0)
        before = np.maximum(stop - self.size, 0)
        given, start = np.asarray(self.prompt.tokens), np.asarray(self.prompt.start)
        tokens = np.zeros((len(given), self.columns), np.int32)
        rows = zip(tokens, given, start, before, stop, body, strict=True)
        for target, row, first, begin, end, question in rows:
            mine = np.concatenate([row[first + begin : first + end], row[first + question :]])
            target[self.columns - len(mine) :] = mine
        first = self.columns - (stop - before) - self.questions
        return Chunk(Prompt(jnp.asarray(tokens), jnp.asarray(first, jnp.int32), self.prompt.window_end), before, stop)

    def room(self) -> tuple[SegmentKV, ...]:
        """Empty slots for what all chunks keep, and the question."""
        first = self.chunk(0)
        kept = jax.eval_shape(partial(run_jit, static=self.each), self.model, first.prompt, None).cache.segments

        def empty(segment: SegmentKV, more: int) -> SegmentKV:
            def wider(a: Any, fill: int) -> Any:
                return jnp.full((*a.shape[:3], a.shape[3] + more, *a.shape[4:]), fill, a.dtype)

            return segment.each(wider)

        return tuple(empty(segment, (self.count - 1) * slots) for segment, slots in zip(kept, self.slots, strict=True))

    def past(self, segments: tuple[SegmentKV, ...], before: np.ndarray) -> KVCache:
        """What a chunk sees of those before it."""
        heads, dtype = self.model.config.num_kv_heads, self.model.dtype
        return KVCache.empty_after(segments, jnp.asarray(before, jnp.int32), 0, heads, dtype)

    def run(self, report: Callable[[int], object] | None = None) -> Prefill:
        """The loop; `report` takes the layers done since the last call, over all chunks as many as the model has."""
        segments, passed = self.room(), []
        layers = self.model.config.num_layers
        for index in range(self.count):
            chunk, last = self.chunk(index), index == self.count - 1
            read = run_jit(self.model, chunk.prompt, self.past(segments, chunk.before), static=self.each)
            stop = jnp.asarray(chunk.stop if not last else self.lengths)
            slots = self.slots if not last else [segment.k.shape[3] for segment in read.cache.segments]
            at = tuple(index * mine for mine in self.slots)
            segments = _store(segments, read.cache.segments, stop, jnp.asarray(at), slots=tuple(slots))
            if read.propagated is not None:
                passed.append(jnp.where(read.propagated < stop[:, None], read.propagated, -1))
            if report is not None:
                jax.block_until_ready(segments)
                report(layers * (index + 1) // self.count - layers * index // self.count)
        c, room = self.model.config, self.static.max_new_tokens
        position = jnp.asarray(self.lengths, jnp.int32)
        cache = KVCache.empty_after(segments, position, room, c.num_kv_heads, self.model.dtype)
        return Prefill(read.logits, cache, jnp.concatenate(passed, axis=1) if passed else None)

    def compile(self, report: Callable[[int], object] | None = None) -> None:
        """Compile what `run` will call, which is the same with a report and without."""
        chunk = self.chunk(0)
        past = jax.eval_shape(lambda: self.past(self.room(), chunk.before))
        run_jit.lower(self.model, chunk.prompt, past, static=self.each).compile()


@partial(jax.jit, static_argnames=("slots",), donate_argnames=("segments",))
def _store(
    segments: Sequence[SegmentKV],
    new: Sequence[SegmentKV],
    stop: Int[Array, " B"],
    at: Int[Array, " S"],
    *,
    slots: tuple[int, ...],
) -> tuple[SegmentKV, ...]:
    """`segments` with the new entries before `stop`, right-aligned in `slots` slots from `at`."""

    def stored(segment: SegmentKV, entries: SegmentKV, slots: int, first: Array) -> SegmentKV:
        place = entries.positions // max(entries.sharing, 1)
        mine = (entries.positions >= 0) & (place < stop[None, :, None, None])
        chosen = choose(jnp.where(mine, 0.0, -jnp.inf), mine.sum(axis=-1, dtype=jnp.int32), slots)

        def put(old: Array, fill: int, values: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(old, chosen.take(values, fill), first, axis=3)

        return segment.each(put, entries)

    return tuple(stored(*one) for one in zip(segments, new, slots, at, strict=True))
