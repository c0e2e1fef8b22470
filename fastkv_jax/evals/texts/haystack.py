"""Text to hide things in: our own chronicle, or the .txt files of a folder."""

import os
from collections.abc import Callable
from pathlib import Path

from fastkv_jax.errors import InputError
from fastkv_jax.evals.texts.documents import FACTS, document


def words(count: int, seed: int, folder: str | os.PathLike[str] | None = None) -> list[str]:
    """`count` words: of the chronicle without its facts, or of the folder's .txt files by name, over and over.

    Raises `InputError` if the folder holds no words.
    """
    text = _chronicle(count, seed) if folder is None else _files(Path(folder))
    return (text * -(-count // len(text)))[:count]


def _chronicle(count: int, seed: int) -> list[str]:
    text = document(count, seed)  # so many without the facts
    for fact in FACTS:  # a number among them would be a second needle
        text = text.replace(f" {fact}", "")
    return text.split()


def _files(folder: Path) -> list[str]:
    found = sorted(folder.glob("*.txt"))  # in one order on every machine
    text = [word for file in found for word in file.read_text(encoding="utf-8", errors="replace").split()]
    if not text:
        raise InputError(f"haystack {folder}: there are no .txt files with words in it")
    return text


def largest(tokens: Callable[[int], int], limit: int, smallest: int, most: int) -> int:
    """The largest size from `smallest` to `most` whose `tokens(size)` are `limit` or fewer; `smallest` if none is.

    Takes about 2 log2(most) calls. `tokens` should not fall as the size grows.
    """
    good, bad = smallest, most + 1
    step = max(smallest, 1)
    while good + step < bad:  # double first: texts much longer than the limit are never made
        if tokens(good + step) > limit:
            bad = good + step
        else:
            good, step = good + step, 2 * step
    while bad - good > 1:
        middle = (good + bad) // 2
        if tokens(middle) > limit:
            bad = middle
        else:
            good = middle
    return good


def shrunk(tokens: Callable[[int], int], limit: int, size: int, smallest: int) -> tuple[int, int] | None:
    """The size, or one not much smaller, whose `tokens` are `limit` or fewer, and these; None if none is."""
    drop = 0
    while (used := tokens(size)) > limit:
        if size == smallest:
            return None
        drop = max(2 * drop, -(-size * (used - limit) // max(used, 1)))
        size = max(smallest, size - drop)
    return size, used
