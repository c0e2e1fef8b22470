"""Running the stages of a plan. One program for every method: it knows a plan and scores, never a name.

tokens -> [layers of stage 0] -> choose rows -> [layers of stage 1] -> ... -> logits of the last token
              |                                    |
              keep entries                         keep entries        -> cache
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from fastkv_jax import rope
from fastkv_jax.attention import Platform, attention, attention_after
from fastkv_jax.buckets import TILE
from fastkv_jax.cache import KVCache, SegmentKV
from fastkv_jax.inputs import Prompt
from fastkv_jax.methods.base import Layer, Method
from fastkv_jax.methods.plan import Stage, static_plan
from fastkv_jax.model import Llama
from fastkv_jax.ops import Kernels, Ops
from fastkv_jax.select import Chosen, choose
from fastkv_jax.sharding import DATA, MODEL, SEQUENCE, parts_of, split


@struct.dataclass
class Prefill:
    """What a prompt leaves behind."""

    logits: Float[Array, "B V"]  # of each row's last token, float32
    cache: KVCache
    propagated: Int[Array, "B S"] | None  # prompt positions that passed the last TSP layer, -1 = empty


class Static(NamedTuple):
    """What a compiled prefill depends on besides shapes."""

    method: Method
    max_new_tokens: int
    tail: int  # an upper bound of window_end
    platform: Platform
    kernels: Kernels = "reference"
    kv_dtype: str | None = None  # of the prompt's entries: "int8" or "float8_e4m3fn"; None = the model's
    extends: bool = True  # what earlier prompts have left is part of the cache, not only seen


class Rows(NamedTuple):
    """The right-aligned rows that enter a layer; see `methods.base.Layer`."""

    positions: Int[Array, "B S"]
    start: Int[Array, " B"]
    stop: Int[Array, " B"]
    window: Int[Array, " B"]


class Progress(NamedTuple):
    """Where a prefill stands between two calls."""

    x: Float[Array, "B S E"]  # hidden rows
    rows: Rows
    token_scores: Float[Array, "R B S"]  # of the last R layers these rows have passed, oldest first


def call(program: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """How programs are called unless somebody wants to look at them first."""
    return program(*args, **static)


def stages_of(model: Llama, prompt: Prompt, static: Static) -> list[Stage]:
    """The static plan for this prompt's bucket."""
    c = model.config
    return static_plan(static.method, c.num_layers, c.num_kv_heads, prompt.tokens.shape[1], static.tail, TILE)


def run_stages(
    model: Llama,
    prompt: Prompt,
    past: KVCache | None,
    static: Static,
    call: Callable[..., Any] = call,
    group: int | None = None,
    report: Callable[[int], object] | None = None,
) -> Prefill:
    """The whole algorithm: run a stage's layers, keep entries, choose the rows that go on, run the next stage's.

    Its programs go through `call`: parts of one program if this is traced, else each its own. `group` limits the
    layers of one call. `past` is what earlier prompts have left: their entries stay, and these tokens see them.
    """
    budgets = call(enter_budgets, model, prompt, static=static)
    at = call(enter, model, prompt, past, static=static)
    propagated, segments, rows_in = None, [], budgets.n
    for stage in stages_of(model, prompt, static):
        if stage.propagates:
            rows_in = call(budget, stage.tokens, budgets, budgets.n)
            at = call(propagate, model, prompt, at, rows_in, stage=shape_of(stage), static=static)
            propagated, segments = at.rows.positions, ([] if stage.restarts else segments)
        kept = call(budget, stage.kept, budgets, rows_in)
        for layers, entries in layer_groups(stage, past, group):
            mine = kept if len(kept) == 1 else kept[layers - stage.first]
            at, new = call(run_layers, model, at, mine, layers, entries, stage=shape_of(stage), static=static)
            segments += [] if new is None else [new]
            if report is not None:
                jax.block_until_ready(at.x)
                report(len(layers))
    renumbered = rows_in if stage.renumbered else budgets.n
    return call(leave, model, at.x, tuple(segments), past, renumbered, propagated, static=static)


def layer_groups(stage: Stage, past: KVCache | None, group: int | None) -> Iterator[tuple[np.ndarray, Any]]:
    """The layers of a stage as arrays of at most `group`, cut where `past` changes shape, with its entries."""
    edges = {stage.first, stage.stop}
    if group is not None:
        edges |= set(range(stage.first, stage.stop, group))
    if past is not None:
        edges |= {edge for edge in past.edges if stage.first < edge < stage.stop}
    ordered = sorted(edges)
    for first, stop in zip(ordered, ordered[1:], strict=False):
        yield np.arange(first, stop), None if past is None else past.run(first, stop)


class Shape(NamedTuple):
    """The static part of a `Stage`, which its layers share whatever their budgets: what they compile for."""

    width: int
    capacity: int | None  # None = all are kept
    restarts: bool
    shared: bool
    renumbered: bool


def shape_of(stage: Stage) -> Shape:
    keeps = stage.capacity if stage.compresses or stage.shared else None
    return Shape(stage.width, keeps, stage.restarts, stage.shared, stage.renumbered)


class Budgets(NamedTuple):
    """What the tables are looked up with."""

    n: Int[Array, " B"]  # true lengths
    protected: Int[Array, " B"]  # how many of the last rows must always stay
    window: Int[Array, " B"]


@partial(jax.jit, static_argnames=("static",))
def enter_budgets(model: Llama, prompt: Prompt, *, static: Static) -> Budgets:
    """True lengths, and the window of each."""
    columns = prompt.tokens.shape[1]
    n = columns - prompt.start
    window = jnp.asarray(static.method.window(np.arange(columns + 1)), jnp.int32)[n]
    return Budgets(n, jnp.where(window > 0, window + prompt.window_end, 0), window)


@partial(jax.jit, static_argnames=("static",))
def enter(model: Llama, prompt: Prompt, past: KVCache | None, *, static: Static) -> Progress:
    """Embedded tokens at the positions after those of the past."""
    columns = prompt.tokens.shape[1]
    position = jnp.arange(columns) - prompt.start[:, None]
    before = 0 if past is None else past.position[:, None]
    window = jnp.asarray(static.method.window(np.arange(columns + 1)), jnp.int32)[columns - prompt.start]
    stop = jnp.asarray(columns - prompt.window_end)
    rows = Rows(jnp.where(position >= 0, position + before, -1), prompt.start, stop, window)
    x = split(model.embed(prompt.tokens), model.mesh, DATA, SEQUENCE)
    return Progress(x, rows, _no_scores(rows, static))


def _no_scores(rows: Rows, static: Static) -> Float[Array, "R B S"]:
    return jnp.full((static.method.memory, *rows.positions.shape), -jnp.inf, jnp.float32)


@jax.jit
def budget(table: Int[Array, "*L T"], budgets: Budgets, limit) -> Int[Array, "*L B"]:
    """The exact budget of each row: looked up by its true length, never less than what must stay, within the limit."""
    return jnp.minimum(limit, jnp.maximum(table[..., budgets.n], budgets.protected))


@partial(jax.jit, static_argnames=("stage", "static"))
def propagate(model: Llama, prompt: Prompt, at: Progress, count, *, stage: Shape, static: Static) -> Progress:
    """Token-selective propagation: the best `count` rows go on, in the order of the text."""
    rows, width = at.rows, stage.width
    ops = Ops(static.kernels, model.mesh)
    chosen = Chosen(choose(at.token_scores.max(axis=0)[:, None], count[:, None], width, ops).columns[:, 0])
    positions = chosen.take(rows.positions, -1)
    if stage.restarts:
        first = rows.positions[:, -1:] - (prompt.tokens.shape[1] - 1)  # position of column 0
        x = model.embed(jnp.take_along_axis(prompt.tokens, jnp.maximum(positions - first, 0), axis=1))
    else:
        x = chosen.take(at.x, 0)
    x = split(x, model.mesh, DATA, SEQUENCE)
    kept_tail = rows.positions.shape[1] - rows.stop
    rows = Rows(positions, width - count, width - kept_tail, rows.window)
    return Progress(x, rows, _no_scores(rows, static))


@partial(jax.jit, static_argnames=("stage", "static"))
def run_layers(
    model: Llama, at: Progress, kept, layers, past: SegmentKV | None, *, stage: Shape, static: Static
) -> tuple[Progress, SegmentKV | None]:
    """The rows after these layers, and what each layer keeps: nothing if the capacity is 0, all if it is None.

    kept [L', B] the budgets of these layers, [1, B] if they have the same; past [L', ...] what they hold already.
    """
    x, rows, token_scores = at
    kept = jnp.broadcast_to(kept, (len(layers), kept.shape[1]))
    chex.assert_rank([x, rows.positions, kept], [3, 2, 2])
    chex.assert_equal_shape_prefix([x, rows.positions], 2)
    c, ops = model.config, Ops(static.kernels, model.mesh)
    columns = jnp.arange(rows.positions.shape[1])
    places = columns - rows.start[:, None] if stage.renumbered else rows.positions
    cos, sin = rope.angles(c.rope, c.head_dim, jnp.maximum(places, 0))
    frequencies = jnp.asarray(rope.frequencies(c.rope, c.head_dim))

    def read(x, token_scores, index, kept):
        """What a layer makes of the rows before they attend, and which entries it keeps."""
        block = model.layer(index)
        q, k, v = block.qkv(x, cos, sin)
        k, v = (split(a, model.mesh, DATA, MODEL) for a in (k, v))  # gathered once, for attention and for scores
        with jax.named_scope("compress"):
            seen = Layer(q, k, v, *rows, kept=kept, frequencies=frequencies, wo=block.wo[...], ops=ops)
            scores = static.method.scores(seen)
            token_scores = jnp.concatenate([token_scores[1:], seen.protect(scores.tokens)[None]])
            entries = None if stage.capacity == 0 else keep(seen, seen.protect(scores.kv), stage)
            if entries is not None and static.kv_dtype is not None:
                entries = entries.quantized(static.kv_dtype)
        return (q, k, v), token_scores, entries

    def layer(carry, inputs):
        x, token_scores, stored = carry
        index, place, kept, past = inputs
        (q, k, v), token_scores, entries = read(x, token_scores, index, kept)
        if stored is not None:  # before attention makes copies of its own, which is the peak of memory
            stored = jax.tree.map(partial(lax.dynamic_update_index_in_dim, index=place, axis=0), stored, entries)
            (q, k, v), token_scores, stored = lax.optimization_barrier(((q, k, v), token_scores, stored))
            entries = None  # nothing waits for the end of the turn
        with jax.named_scope("attention"):
            if past is None:
                attended = attention(q, k, v, rows.start, platform=static.platform, mesh=model.mesh)
            else:
                old = past.dequantized(k.dtype)
                attended = attention_after((old.k, old.v, old.positions >= 0, old.heads), q, k, v, rows.start)
            x = model.layer(index).output(x, attended, parts_of(x.shape[1], model.mesh))
        if past is not None and entries is not None and static.extends:
            entries = past.extended(entries, c.num_kv_heads)
        return (x, token_scores, stored), entries

    stored = None
    if stage.capacity and (past is None or not static.extends):
        one = jax.eval_shape(read, x, token_scores, layers[0], kept[0])[2]
        stored = jax.tree.map(lambda a: jnp.zeros((len(layers), *a.shape), a.dtype), one)
    inputs = layers, jnp.arange(len(layers)), kept, past
    (x, token_scores, stored), entries = lax.scan(layer, (x, token_scores, stored), inputs)
    return Progress(x, rows, token_scores), entries if stored is None else stored


def keep(layer: Layer, scores, stage: Shape) -> SegmentKV:
    """The best entries of each cache head, or of all heads together; all if the capacity is None."""
    heads, tokens = scores.shape[1:]
    k, v = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (layer.k, layer.v))  # per query head where published
    positions = jnp.broadcast_to(layer.positions[:, None], scores.shape)
    if stage.capacity is None:
        return SegmentKV(k, v, positions)
    if not stage.shared:
        chosen = choose(scores, layer.kept[:, None], stage.capacity, layer.ops)
        return SegmentKV(chosen.take(k, 0), chosen.take(v, 0), chosen.take(positions, -1))
    codes = jnp.where(positions >= 0, positions * heads + jnp.arange(heads)[:, None], -1)
    scores, codes = scores.reshape(-1, 1, heads * tokens), codes.reshape(-1, 1, heads * tokens)
    k, v = (a.reshape(a.shape[0], 1, heads * tokens, -1) for a in (k, v))
    chosen = choose(scores, heads * layer.kept[:, None], stage.capacity, layer.ops)
    return SegmentKV(chosen.take(k, 0), chosen.take(v, 0), chosen.take(codes, -1), sharing=heads)


@partial(jax.jit, static_argnames=("static",))
def leave(model: Llama, x, segments: tuple[SegmentKV, ...], past, length, propagated, *, static: Static) -> Prefill:
    """Logits of the last row, and the cache with an empty buffer for decoded tokens."""
    position = length if past is None else past.position + length
    cache = KVCache.empty_after(segments, position, static.max_new_tokens, model.config.num_kv_heads, x.dtype)
    return Prefill(model.logits(x[:, -1]), cache, propagated)


run_jit = jax.jit(run_stages, static_argnames=("static",))
