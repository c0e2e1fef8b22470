"""Streaming: the tokens of `generate` as they are made, as text where there is a tokenizer."""

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Array, Key

from fastkv_jax.decoding.answers import Transcript
from fastkv_jax.decoding.loop import decode_chunks
from fastkv_jax.decoding.sampling import Greedy, Sampler
from fastkv_jax.errors import InputError
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.doors import PrefillOptions, prefill


def stream(
    model: Llama,
    tokens: Any,
    start: Any = None,
    *,
    sampler: Sampler = Greedy(),  # noqa: B008 - a frozen value
    stop_tokens: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
    tokenizer: Any = None,
    **options: Unpack[PrefillOptions],
) -> Iterator[Any]:
    """`generate`, piece by piece: text of one prompt with a tokenizer, else chunks of tokens [B, c] int32.

    Text pieces never end inside a character and leave special tokens out; chunks hold stop tokens and padding.

    Args:
        model: from `load_model`
        tokens: [B, T] int32, rows right-aligned
        start: [B] int32, the first valid column of each row (default: None, 0)
        sampler: `Greedy` or `Sample(...)` (default: the most likely token)
        stop_tokens: token ids that end a row, () for none (default: None, the checkpoint's own list)
        key: of `jax.random`, which every sampler but `Greedy` needs (default: None)
        tokenizer: makes text of the tokens (default: None, chunks of tokens)
        **options: `method`, `max_new_tokens`, and the others of `PrefillOptions`

    Raises:
        InputError: as `generate`, and for a batch of several prompts with a tokenizer
    """
    prompt = prefill(model, tokens, start, **options)
    chunks = decode_chunks(
        model, prompt, max_new_tokens=options["max_new_tokens"], sampler=sampler, stop_tokens=stop_tokens, key=key,
        kernels=options.get("kernels"),
    )  # fmt: skip
    if tokenizer is None:
        return (chunk for chunk, _ in chunks)
    if prompt.logits.shape[0] != 1:
        raise InputError(f"text can be streamed for one prompt at a time, got a batch of {prompt.logits.shape[0]}")
    ends = set(model.config.stop_tokens if stop_tokens is None else stop_tokens)
    return _pieces((chunk for chunk, _ in chunks), Transcript(tokenizer, ends))


def _pieces(chunks: Iterator[np.ndarray], answer: Transcript) -> Iterator[str]:
    for chunk in chunks:
        for token in chunk[0].tolist():
            if piece := answer.push(token):
                yield piece
    if piece := answer.close():
        yield piece
