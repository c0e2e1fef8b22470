"""The programs that a pass is made of; `passes` calls them. They know a plan and scores, never a method's name."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.cache.segment import SegmentKV
from fastkv_jax.cache.select import Chosen, choose
from fastkv_jax.methods.base import Layer, Method, Scores
from fastkv_jax.model import rope
from fastkv_jax.model.attention import attention, attention_after
from fastkv_jax.model.blockwise import by_blocks
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.ops import Ops
from fastkv_jax.model.platforms import Kernels, Platform, in_full_precision
from fastkv_jax.model.sharding import DATA, MODEL, SEQUENCE, parts_of, split
from fastkv_jax.prefilling.prompt import Prompt


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


class Progress(NamedTuple):
    """Where a prefill stands between two calls."""

    x: Float[Array, "B S E"]  # hidden rows
    rows: Rows
    token_scores: Float[Array, "R B S"]  # of the last R layers these rows have passed, oldest first


class Reader(NamedTuple):
    """A method that reads layers, and what each keeps for it: the static part, which layers share."""

    method: Method
    capacity: int | None  # slots of each cache head; 0 = nothing is kept, None = all
    shared: bool = False  # the slots are those of all heads together
    scored_as: Method | None = None  # readers that have this in common have the same scores; None: nobody else has


class Budgets(NamedTuple):
    """What the tables are looked up with."""

    n: Int[Array, " B"]  # true lengths
    protected: Int[Array, " B"]  # how many of the last rows must always stay
    window: Int[Array, " B"]


class Own(NamedTuple):
    """What a reader is told beside the layer."""

    kept: Int[Array, "*L B"]  # exact budgets of the layers; [1, B] if they are the same
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
    position = jnp.arange(columns)[None] - prompt.start[:, None]
    before = 0 if past is None else past.position[:, None]
    stop = jnp.asarray(columns - prompt.window_end)
    rows = Rows(jnp.where(position >= 0, position + before, -1), prompt.start, stop)
    x = split(model.embed(prompt.tokens), model.mesh, DATA, SEQUENCE)
    return Progress(x, rows, _no_scores(rows, static))


def _no_scores(rows: Rows, static: Static) -> Float[Array, "R B S"]:
    return jnp.full((static.method.memory, *rows.positions.shape), -jnp.inf, jnp.float32)


@jax.jit
def budget(table: Int[Array, "*L T"], budgets: Budgets, limit) -> Int[Array, "*L B"]:
    """The exact budget of each row: looked up by its true length, never less than what must stay, within the limit."""
    counted = table[..., budgets.n]
    least, most = (jnp.broadcast_to(a, counted.shape) for a in (budgets.protected, limit))
    return jnp.minimum(most, jnp.maximum(counted, least))


@partial(jax.jit, static_argnames=("width", "restarts", "static"))
def propagate(
    model: Llama, prompt: Prompt, at: Progress, count: Int[Array, " B"], *, width: int, restarts: bool, static: Static
) -> Progress:
    """Token-selective propagation: the best `count` rows go on, in the order of the text, in `width` columns.

    Where the prompt is read anew (`restarts`) they enter the model from the bottom.
    """
    rows, ops = at.rows, Ops(static.kernels, model.mesh)
    chosen = Chosen(choose(at.token_scores.max(axis=0)[:, None], count[:, None], width, ops).columns[:, 0])
    positions = chosen.take(rows.positions, -1)
    if restarts:
        first = rows.positions[:, -1:] - (prompt.tokens.shape[1] - 1)  # position of column 0
        x = model.embed(jnp.take_along_axis(prompt.tokens, jnp.maximum(positions - first, 0), axis=1))
    else:
        x = chosen.take(at.x, 0)
    x = split(x, model.mesh, DATA, SEQUENCE)
    kept_tail = rows.positions.shape[1] - rows.stop
    rows = Rows(positions, width - count, width - kept_tail)
    return Progress(x, rows, _no_scores(rows, static))


class Turns(NamedTuple):
    """The rotation of the rows that enter a layer."""

    cos: Float[Array, "B S D"]
    sin: Float[Array, "B S D"]
    frequencies: Float[Array, " D/2"]


def turns(model: Llama, places: Int[Array, "B S"]) -> Turns:
    """Of rows at these places, -1 = padding; the same in every layer."""
    c = model.config
    cos, sin = rope.angles(c.rope, c.head_dim, jnp.maximum(places, 0))
    return Turns(cos, sin, jnp.asarray(rope.frequencies(c.rope, c.head_dim)))


def observe(model: Llama, index, x: Float[Array, "B S E"], rows: Rows, turn: Turns, ops: Ops) -> Layer:
    """What layer `index` makes of the rows before they attend, as a method may look at it; no window, no budget yet."""
    block = model.layer(index)
    q, k, v = block.qkv(x, turn.cos, turn.sin)
    k, v = (split(a, model.mesh, DATA, MODEL) for a in (k, v))  # gathered once, for attention and for scores
    none = jnp.zeros_like(rows.start)
    return Layer(q, k, v, *rows, none, none, turn.frequencies, block.wo[...], ops)


@partial(jax.jit, static_argnames=("readers", "renumbered", "static"))
@in_full_precision
def run_layers(
    model: Llama,
    at: Progress,
    own: tuple[Own, ...],
    layers: Int[Array, " L"],
    past: SegmentKV | None,
    *,
    readers: tuple[Reader, ...],
    static: Static,
    renumbered: bool = False,
) -> tuple[Progress, tuple[SegmentKV | None, ...]]:
    """The rows after these layers, and what each layer keeps for each reader; the first one scores the rows.

    past [L, ...] what the layers hold already; rows that are `renumbered` stand at 0, 1, 2, ... instead of their place.
    """
    x, rows, token_scores = at
    kept = tuple(jnp.broadcast_to(mine.kept, (len(layers), mine.kept.shape[1])) for mine in own)
    chex.assert_rank([x, rows.positions, *kept], [3, 2, *[2] * len(kept)])
    chex.assert_equal_shape_prefix([x, rows.positions], 2)
    c, ops = model.config, Ops(static.kernels, model.mesh)
    columns = jnp.arange(rows.positions.shape[1])[None]
    turn = turns(model, columns - rows.start[:, None] if renumbered else rows.positions)
    windows = tuple(mine.window for mine in own)

    def read(x, token_scores, index, kept):
        layer = observe(model, index, x, rows, turn, ops)
        newest, entries = _kept_by_each(layer, readers, kept, windows, static)
        return (layer.q, layer.k, layer.v), jnp.concatenate([token_scores[1:], newest[None]]), entries

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
            x = by_blocks(model.layer(index).output, x, attended, parts_of(x.shape[1], model.mesh))
        if past is not None and entries is not None and static.extends:
            entries = tuple(None if one is None else past.extended(one, c.num_kv_heads) for one in entries)
        return (x, token_scores, stored), entries

    stored = None
    if any(reader.capacity for reader in readers) and (past is None or not static.extends):
        one = jax.eval_shape(read, x, token_scores, layers[0], tuple(mine[0] for mine in kept))[2]
        stored = jax.tree.map(lambda a: jnp.zeros((len(layers), *a.shape), a.dtype), one)
    inputs = layers, jnp.arange(len(layers)), kept, past
    (x, token_scores, stored), entries = lax.scan(layer, (x, token_scores, stored), inputs)
    kept_by_all: Any = entries if stored is None else stored
    return Progress(x, rows, token_scores), kept_by_all


def _kept_by_each(
    layer: Layer,
    readers: tuple[Reader, ...],
    kept: tuple[Int[Array, " B"], ...],
    windows: tuple[Int[Array, " B"], ...],
    static: Static,
) -> tuple[Float[Array, "B S"], tuple[SegmentKV | None, ...]]:
    """The first reader's token scores, and which entries of the layer each reader keeps."""
    with jax.named_scope("compress"):
        found, known = [], {}  # XLA does not merge equal scores that hold loops
        for reader, count, window in zip(readers, kept, windows, strict=True):
            seen, key = layer._replace(kept=count, window=window), reader.scored_as or reader
            if key not in known:
                known[key] = reader.method.scores(seen)
            found.append(_read(seen, known[key], reader, static))
    return found[0][0], tuple(entries for _, entries in found)


def _read(layer: Layer, scores: Scores, reader: Reader, static: Static) -> tuple[Float[Array, "B S"], SegmentKV | None]:
    """Token scores, and the entries that stay."""
    tokens = layer.protect(scores.tokens)
    if reader.capacity == 0:
        return tokens, None
    entries = keep(layer, layer.protect(scores.kv), reader)
    return tokens, entries if static.kv_dtype is None else entries.quantized(static.kv_dtype)


def keep(layer: Layer, scores: Float[Array, "B N S"], reader: Reader) -> SegmentKV:
    """The best entries of each cache head, or of all heads together; all if the capacity is None."""
    heads, tokens = scores.shape[1:]
    k, v = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (layer.k, layer.v))  # per query head where published
    positions = jnp.broadcast_to(layer.positions[:, None], scores.shape)
    if reader.capacity is None:
        return SegmentKV(k, v, positions)
    if not reader.shared:
        chosen = choose(scores, layer.kept[:, None], reader.capacity, layer.ops)
        return SegmentKV(chosen.take(k, 0), chosen.take(v, 0), chosen.take(positions, -1))
    codes = jnp.where(positions >= 0, positions * heads + jnp.arange(heads)[None, :, None], -1)
    scores, codes = scores.reshape(-1, 1, heads * tokens), codes.reshape(-1, 1, heads * tokens)
    k, v = (a.reshape(a.shape[0], 1, heads * tokens, -1) for a in (k, v))
    chosen = choose(scores, heads * layer.kept[:, None], reader.capacity, layer.ops)
    return SegmentKV(chosen.take(k, 0), chosen.take(v, 0), chosen.take(codes, -1), sharing=heads)


@partial(jax.jit, static_argnames=("static",))
@in_full_precision
def leave(model: Llama, x, segments: tuple[SegmentKV, ...], past, length, propagated, *, static: Static) -> Prefill:
    """Logits of the last row, and the cache with an empty buffer for decoded tokens."""
    position = length if past is None else past.position + length
    cache = KVCache.empty_after(segments, position, static.max_new_tokens, model.config.num_kv_heads, x.dtype)
    return Prefill(model.logits(x[:, -1]), cache, propagated)
