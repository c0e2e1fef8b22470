"""A picture of what was propagated and kept, per layer and head, over the text: as PNG or as one HTML page."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from fastkv_jax.decoding.answers import TextStream
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.explanation import page, png
from fastkv_jax.explanation.kept import Kept
from fastkv_jax.files import check_target, replacing
from fastkv_jax.prefilling.doors import Prefill

RENDERERS: dict[str, Callable[[Kept], bytes]] = {".png": png.render, ".html": page.render}


class Explanation(Kept):
    """What `explain` found, to be looked at or saved."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a picture (.png, needs matplotlib) or a page that needs nothing but a browser (.html).

        The file is complete or absent; one that is there is replaced. Raises as `check_path`, and `FastKVConfigError`
        if matplotlib is missing.
        """
        render = check_path(path)
        content = render(self)
        with replacing(path) as scratch:
            scratch.write_bytes(content)


def check_path(path: str | os.PathLike[str]) -> Callable[[Kept], bytes]:
    """What makes a file of this name, or `FastKVConfigError` for another suffix, `InputError` for a bad place."""
    render = RENDERERS.get(Path(path).suffix.lower())
    if render is None:
        raise FastKVConfigError(f"cannot write {path}: its name must end in {' or '.join(RENDERERS)}")
    check_target(path)
    return render


def explain(result: Prefill, tokens: Any, tokenizer: Any = None, *, row: int = 0, start: Any = None) -> Explanation:
    """What `prefill` propagated and kept of one row, over its text.

    Everything is brought to the host.

    Args:
        result: of `prefill`
        tokens: [B, T] int32 as given to it
        tokenizer: a transformers tokenizer, to show text (default: None, ids are shown)
        row: which prompt of the batch (default: 0)
        start: [B] int32 as given to `prefill` (default: None, 0)

    Raises:
        InputError: if the arguments do not fit each other, or if the cache was already given to decoding
    """
    ids = _row_ids(result, tokens, start, row)
    layers = range(result.cache.k_new.shape[0])
    positions = [np.asarray(result.cache.layer(i).positions[row]) for i in layers]
    heads = tuple(p.shape[0] for p in positions)
    kept = np.zeros((len(layers), max(heads), ids.size), bool)
    for layer, head_positions in enumerate(positions):
        for head, p in enumerate(head_positions):
            kept[layer, head] = _marked(p, ids.size)
    propagated = None if result.propagated is None else _marked(np.asarray(result.propagated[row]), ids.size)
    words = [str(i) for i in ids] if tokenizer is None else _texts(tokenizer, ids.tolist())
    return Explanation(ids, tuple(words), tokenizer is not None, kept, heads, propagated)


def _row_ids(result: Prefill, tokens: Any, start: Any, row: int) -> Int[np.ndarray, " n"]:
    """The token ids of one row without its padding, after checking that they are what `result` was made from."""
    batch, vocabulary = result.logits.shape
    if isinstance(result.cache.k_new, jax.Array) and result.cache.k_new.is_deleted():
        raise InputError("the cache of this result was given to decoding, which donates it: explain the result before")
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError("tokens must be int32 of shape [batch, length], got rows of different lengths") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"tokens must be int32 of shape [batch, length], got {array.dtype} {list(array.shape)}")
    if len(array) != batch:
        raise InputError(f"tokens have {len(array)} rows, the result has {batch}")
    if not isinstance(row, int | np.integer) or isinstance(row, bool) or not 0 <= row < batch:
        raise InputError(f"row {row!r} is outside 0..{batch - 1}")
    first = np.zeros(batch, np.int32) if start is None else np.asarray(start)
    if first.shape != (batch,) or not np.issubdtype(first.dtype, np.integer) or (first < 0).any():
        raise InputError(f"start must be {batch} integers >= 0, got {start!r}")
    ids = array[row, first[row] :]
    following, decoded = int(result.cache.position[row]), int(result.cache.used)
    if not following - decoded <= ids.size <= following:  # a row may have decoded fewer
        made = following - decoded
        raise InputError(f"row {row} has {ids.size:,} tokens, the result was made from {made:,}: pass its own start")
    if (ids < 0).any() or (ids >= vocabulary).any():
        raise InputError(f"row {row} holds token ids outside the result's vocabulary of {vocabulary}")
    return ids


def _marked(positions: Int[np.ndarray, " C"], n: int) -> Bool[np.ndarray, " n"]:
    """Which of 0 ... n - 1 are among `positions`, where -1 is none."""
    if positions.max(initial=-1) >= n:
        raise InputError(f"the cache holds position {positions.max()}, the tokens given end at {n - 1}")
    marks = np.zeros(n, bool)
    marks[positions[positions >= 0]] = True
    return marks


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character made of several tokens belongs to the last of them."""
    stream, texts = TextStream(tokenizer, skip_special_tokens=False), []
    for token, following in zip(ids, [*ids[1:], None], strict=True):
        text = stream.push(token)
        # A run of byte tokens ends with its last one, not with the token after it.
        ends = following is None or (stream.is_byte(token) and not stream.is_byte(following))
        texts.append(text + stream.flush() if ends else text)
    return texts
