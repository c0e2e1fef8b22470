"""A pass over a batch of prompts, some layers at a time. One for every method: it knows a plan, never a name.

tokens -> [layers of stage 0] -> choose rows -> [layers of stage 1] -> ... -> logits of the last token
              |                                    |
              keep entries                         keep entries        -> cache

Whoever drives a pass says which layers come next: `Whole` as the plan has it, `adaptive` as the scores will have it,
`chunked` again for each chunk, `many_methods` with several readers of the same layers.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from fastkv_jax.buckets import TILE
from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.cache.segment import SegmentKV, joined
from fastkv_jax.methods.base import Method
from fastkv_jax.methods.plan import Stage, static_plan
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.layers import (
    Own,
    Prefill,
    Reader,
    Static,
    budget,
    enter,
    enter_budgets,
    leave,
    propagate,
    run_layers,
)
from fastkv_jax.prefilling.prompt import Prompt

GROUP = 5  # layers per call where progress is reported


def stages_of(model: Llama, prompt: Prompt, static: Static) -> list[Stage]:
    """The static plan for this prompt's bucket."""
    c = model.config
    return static_plan(static.method, c.num_layers, c.num_kv_heads, prompt.tokens.shape[1], static.tail, TILE)


def call(program: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """How programs are called unless somebody wants to look at them first."""
    return program(*args, **static)


def compile_and_call(program: Any, *args: Any, **static: Any) -> Any:
    """Compile a program for arguments of which only the shapes are known, and pass on the shapes of its results."""

    def shape(x: Any) -> jax.ShapeDtypeStruct:  # as jit takes it: NumPy's int64 is int32 there
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

    shapes = [a if isinstance(a, Llama) else jax.tree.map(shape, a) for a in args]
    program.lower(*shapes, **static).compile()
    return program(*args, **static)


@dataclass
class Pass:
    """Where a batch of prompts stands between two layers, and what the layers behind it have kept.

    past    what earlier prompts have left: their entries stay, and these tokens see them
    call    how programs are called: as parts of one program if this is traced, else each is its own
    report  takes the number of layers done since the last call
    """

    model: Llama
    prompt: Prompt
    past: KVCache | None
    static: Static
    call: Callable[..., Any] = call
    report: Callable[[int], object] | None = None
    segments: list[SegmentKV] = field(default_factory=list, init=False)
    propagated: Int[Array, "B S"] | None = field(default=None, init=False)

    def __post_init__(self):
        self.budgets = self.call(enter_budgets, self.model, self.prompt, static=self.static)
        self.at = self.call(enter, self.model, self.prompt, self.past, static=self.static)
        self.rows_in = self.budgets.n

    def enter(self, stage: Stage) -> None:
        """Choose the rows that go on (TSP) where the stage drops some; its budgets hold from here."""
        self.stage = stage
        self.reader = reader_of(self.static.method, stage)
        if stage.propagates:
            self.rows_in = self.call(budget, stage.tokens, self.budgets, self.budgets.n)
            self.at = self.call(
                propagate, self.model, self.prompt, self.at, self.rows_in,
                width=stage.width, restarts=stage.restarts, static=self.static,
            )  # fmt: skip
            self.propagated = self.at.rows.positions
            self.segments = [] if stage.restarts else self.segments
        self.kept = self.call(budget, stage.kept, self.budgets, self.rows_in)

    def in_runs(self, layers: range) -> list[range]:
        """These layers, cut where a GPU's kernels would not find every entry that they leave."""
        if self.static.kernels != "gpu" or self.static.kv_dtype is None:
            return [layers]
        _, (one,) = jax.eval_shape(lambda: self._run(call, layers[:1]))
        if one is None:
            return [layers]
        every = one.each(lambda a, _: jax.ShapeDtypeStruct((len(layers), *a.shape[1:]), a.dtype))
        sizes = jax.eval_shape(lambda cache: cache.in_runs(self.model.mesh), every)
        edges = [0, *accumulate(run.k.shape[0] for run in sizes)]
        return [layers[i:j] for i, j in pairwise(edges)]

    def layers(self, layers: Sequence[int]) -> None:
        """Run these layers of the stage, and keep their entries."""
        self.at, (entries,) = self._run(self.call, layers)
        self.segments += [] if entries is None else [entries]
        if self.report is not None:
            jax.block_until_ready(self.at.x)
            self.report(len(layers))

    def _run(self, call: Callable[..., Any], layers: Sequence[int]) -> Any:
        index = np.asarray(layers)
        kept = self.kept if len(self.kept) == 1 else self.kept[index - self.stage.first]
        return call(
            run_layers, self.model, self.at, (Own(kept, self.budgets.window),), index, _past_of(self.past, layers),
            readers=(self.reader,), renumbered=self.stage.renumbered, static=self.static,
        )  # fmt: skip

    def branch(self) -> "Pass":
        """Another pass that goes on from here."""
        other = copy.copy(self)
        other.segments = list(self.segments)
        return other

    def join(self) -> None:
        """Put what all layers have kept into one segment, so that decoding compiles once whatever the layers chosen."""
        self.segments = [joined(self.segments)]

    def finish(self) -> Prefill:
        """Logits of the last row, and the cache."""
        length = self.rows_in if self.stage.renumbered else self.budgets.n
        return self.call(
            leave, self.model, self.at.x, tuple(self.segments), self.past, length, self.propagated, static=self.static
        )


def reader_of(method: Method, stage: Stage) -> Reader:
    """What a method keeps of the layers of a stage."""
    return Reader(method, stage.capacity if stage.compresses or stage.shared else None, stage.shared)


def _past_of(past: KVCache | None, layers: Sequence[int]) -> SegmentKV | None:
    """Entries of a group of layers, joined where they lie in several runs."""
    if past is None:
        return None
    first, stop = int(layers[0]), int(layers[-1]) + 1
    edges = [first, *(edge for edge in past.edges if first < edge < stop), stop]
    runs = [past.run(begin, end) for begin, end in zip(edges, edges[1:], strict=False)]
    return runs[0] if len(runs) == 1 else joined(runs)


@dataclass(frozen=True)
class Whole:
    """A prefill as the plan has it."""

    model: Llama
    prompt: Prompt
    past: KVCache | None
    static: Static

    def run(self, report: Callable[[int], object] | None = None) -> Prefill:
        """As one program; with `report` a few layers at a time."""
        if report is None:
            return run_jit(self.model, self.prompt, self.past, static=self.static)
        return run_stages(self.model, self.prompt, self.past, self.static, group=GROUP, report=report)

    def compile(self, report: Callable[[int], object] | None = None) -> None:
        """Compile what `run` with this argument will call."""
        if report is None:
            run_jit.lower(self.model, self.prompt, self.past, static=self.static).compile()
            return

        def every_program(prompt: Prompt, past: KVCache | None) -> Prefill:
            return run_stages(self.model, prompt, past, self.static, compile_and_call, GROUP)

        jax.eval_shape(every_program, self.prompt, self.past)


def run_stages(
    model: Llama,
    prompt: Prompt,
    past: KVCache | None,
    static: Static,
    call: Callable[..., Any] = call,
    group: int | None = None,
    report: Callable[[int], object] | None = None,
) -> Prefill:
    """The whole algorithm, at most `group` layers a call."""
    on = Pass(model, prompt, past, static, call, report)
    for stage in stages_of(model, prompt, static):
        on.enter(stage)
        for layers in layer_groups(stage, past, group):
            for run in on.in_runs(layers):
                on.layers(run)
    return on.finish()


run_jit = jax.jit(run_stages, static_argnames=("static",))


def layer_groups(stage: Stage, past: KVCache | None, group: int | None = None) -> Iterator[range]:
    """The layers of a stage, at most `group` at once, cut where `past` changes shape."""
    edges = {stage.first, stage.stop}
    if group is not None:
        edges |= set(range(stage.first, stage.stop, group))
    if past is not None:
        edges |= {edge for edge in past.edges if stage.first < edge < stage.stop}
    ordered = sorted(edges)
    return (range(first, stop) for first, stop in zip(ordered, ordered[1:], strict=False))
