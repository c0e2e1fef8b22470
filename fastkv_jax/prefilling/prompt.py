"""Checks at the public doors, on the host, before anything compiles. Traced arrays pass unchecked."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from fastkv_jax.buckets import round_up
from fastkv_jax.errors import InputError
from fastkv_jax.model.config import LlamaConfig

TAIL_TILE = 64  # template tails of up to 64 tokens share one compilation


class Prompt(NamedTuple):
    """A checked batch of prompts, all int32."""

    tokens: Int[Array, "B T"]
    start: Int[Array, " B"]
    window_end: Int[np.ndarray, " B"]


def check_batch(
    tokens: Any, start: Any, window_end: Any, config: LlamaConfig, max_new_tokens: int, before: Any = None
) -> Prompt:
    """The batch as int32 arrays, or `InputError` saying which value at which index is wrong.

    `before` [B] counts the tokens that stand before these in a cache, None without one.
    """
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    traced = any(isinstance(given, Tracer) for given in (tokens, start, before))
    if not isinstance(tokens, Tracer):
        tokens = _check_tokens(tokens, config)
    batch, columns = tokens.shape
    if start is None:
        start = np.zeros(batch, np.int32)
    elif not isinstance(start, Tracer):
        start = _check_start(start, batch, columns)
    window_end = _check_window_end(window_end, batch)
    if before is not None and before.shape != (batch,):
        raise InputError(f"the cache holds {before.shape[0]} rows, the batch {batch}")
    if not traced:
        earlier = 0 if before is None else np.asarray(before)
        check_lengths(np.asarray(columns - start) + earlier, config, max_new_tokens)
        for row in np.flatnonzero(window_end >= columns - start):
            raise InputError(
                f"window_end {window_end[row]} leaves no question in row {row} ({columns - start[row]} tokens)"
            )
    return Prompt(jnp.asarray(tokens, jnp.int32), jnp.asarray(start, jnp.int32), window_end)


def static_tail(window_end: np.ndarray) -> int:
    """An upper bound of `window_end` that changes seldom: capacities depend on it."""
    return round_up(int(window_end.max()), TAIL_TILE)


def check_lengths(lengths: np.ndarray, config: LlamaConfig, max_new_tokens: int) -> None:
    """Raise `InputError` for a prompt that leaves no room for its new tokens (at least one) in the model's context."""
    longest, new = int(np.max(lengths)), max(max_new_tokens, 1)
    if longest + new > config.max_position_embeddings:
        raise InputError(
            f"prompt has {longest:,} tokens + {new:,} new > {config.max_position_embeddings:,} "
            "(max_position_embeddings). Use a shorter prompt, or fewer new tokens."
        )
    if config.sliding_window is not None and longest + new > config.sliding_window:
        raise InputError(
            f"sliding-window attention is not implemented: {longest:,} tokens + {new:,} new > "
            f"{config.sliding_window:,} (sliding_window)"
        )


def _check_tokens(tokens: Any, config: LlamaConfig) -> np.ndarray:
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError("input_ids must be int32 of shape [batch, length], got rows of different lengths") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"input_ids must be int32 of shape [batch, length], got {array.dtype} {list(array.shape)}")
    if array.size == 0:
        raise InputError(f"prompt is empty: tokens have shape {list(array.shape)}")
    outside = np.argwhere((array < 0) | (array >= config.vocab_size))
    if outside.size:
        row, column = map(int, outside[0])
        raise InputError(
            f"token id {array[row, column]} at [{row}, {column}] is outside the vocabulary of {config.vocab_size}"
        )
    return array


def _check_start(start: Any, batch: int, columns: int) -> np.ndarray:
    array = np.asarray(start)
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"start must be int32 of shape [{batch}], got {array.dtype} {list(array.shape)}")
    for row in np.flatnonzero(array == columns):
        raise InputError(f"row {row} of the batch is empty: start {array[row]} leaves none of {columns} columns")
    for row in np.flatnonzero((array < 0) | (array > columns)):
        raise InputError(f"start {array[row]} of row {row} is outside 0..{columns - 1}")
    return array


def _check_window_end(window_end: Any, batch: int) -> np.ndarray:
    if isinstance(window_end, Tracer):
        raise InputError("window_end must be known before tracing: capacities depend on it")
    array = np.asarray(window_end)
    if array.shape not in ((), (batch,)) or not np.issubdtype(array.dtype, np.integer) or (array < 0).any():
        raise InputError(f"window_end must be one integer >= 0 or {batch} of them, got {window_end!r}")
    return np.broadcast_to(array, (batch,)).astype(np.int32)
