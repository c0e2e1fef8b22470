"""Prompt lengths are padded to a few fixed sizes, so that XLA compiles once for each of them."""

from collections.abc import Sequence

import numpy as np

from fastkv_jax.errors import InputError

TILE = 128  # lanes of a TPU register; every bucket and capacity above it is a multiple


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that holds n."""
    return -(-n // multiple) * multiple


def bucket_for(n: int) -> int:
    """Columns for a prompt of n tokens: four sizes to each doubling, so that at most a fifth is padding from 512 on."""
    if n <= TILE:
        return next(size for size in (16, 32, 64, TILE) if size >= n)
    step = max(TILE, 2 ** ((n - 1).bit_length() - 3))
    return round_up(n, step)


def _as_array(prompt: Sequence[int] | np.ndarray) -> np.ndarray:
    try:
        return np.asarray(prompt)
    except ValueError:  # ragged
        return np.asarray(prompt, dtype=object)


def pad_batch(
    prompts: Sequence[Sequence[int] | np.ndarray], bucket: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad token lists to one width: (tokens [B, T] int32, start [B] int32: the first valid column).

        [[5, 6], [7]], bucket 4   ->   0 0 5 6 , 2
                                       0 0 0 7 , 3

    Args:
        prompts: token ids of each row
        bucket: T (default: None, the next bucket)

    Raises:
        InputError: for an empty batch or row, or a bucket too small
    """
    rows = [_as_array(prompt) for prompt in prompts]
    if not rows:
        raise InputError("the batch is empty")
    for index, row in enumerate(rows):
        if row.size == 0:
            raise InputError(f"prompt {index} of the batch is empty")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"prompt {index} must be a list of token ids, got {row.dtype} {list(row.shape)}")
        if row.min() < 0 or row.max() >= 2**31:
            odd = row.min() if row.min() < 0 else row.max()
            raise InputError(f"prompt {index} holds token id {odd}, which is no int32 >= 0")
    longest = max(row.size for row in rows)
    width = bucket_for(longest) if bucket is None else bucket
    if width < longest:
        raise InputError(f"bucket {width} is smaller than the longest prompt ({longest} tokens)")
    tokens = np.zeros((len(rows), width), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[width - row.size :] = row
    return tokens, np.array([width - row.size for row in rows], np.int32)
