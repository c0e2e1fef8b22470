"""A saved cache on the command line: a document read once, asked about many times.

The document is read up to where its words end. What the chat template says after them is kept in the file's note, so
that a later question goes on in the same message: document, newline, question, template's end.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkv_jax import text
from fastkv_jax.cache import KVCache
from fastkv_jax.cache_file import load_cache, load_note, save_cache
from fastkv_jax.cli.engine import Encoded
from fastkv_jax.cli.prompts import Request
from fastkv_jax.config import LlamaConfig
from fastkv_jax.errors import CheckpointError, InputError
from fastkv_jax.inputs import check_lengths
from fastkv_jax.model import Llama


@dataclass(frozen=True)
class Saved:
    """What the note of a cache file says."""

    path: Path
    tail: list[int]  # the template's tokens after the user's words
    tokens: int  # of the document
    method: str

    @classmethod
    def read(cls, path: str) -> "Saved":
        """From a file that `save` wrote, or `CheckpointError`."""
        note = load_note(path)
        if not {"tail", "tokens", "method"} <= note.keys():
            raise CheckpointError(f"{path} was not written by --save-cache")
        return cls(Path(path), note["tail"], note["tokens"], note["method"])

    def load(self, model: Llama, tokenizer: Any) -> KVCache:
        """The cache, or `CheckpointError` if it belongs to another model or tokenizer."""
        return load_cache(self.path, model, tokenizer)

    def encode(self, tokenizer: Any, request: Request, config: LlamaConfig, new: int, split: bool) -> Encoded:
        """A question as the end of the document's message. Raises `InputError` where it does not fit."""
        if request.system:
            raise InputError("--load-cache has no place for a system message: the conversation has begun")
        words = text.continue_with(tokenizer, "\n" + request.prompt, split_special_tokens=split)
        begun = text.continue_with(tokenizer, request.prefill) if request.prefill else []
        ids = [*words, *self.tail, *begun]
        check_lengths(np.array([self.tokens + len(ids)]), config, new)
        return Encoded(ids, 0, 0)


def save(path: str, cache: KVCache, model: Llama, tokenizer: Any, prompt: Encoded, method: Any) -> None:
    """Write the cache of a prompt whose words have been read."""
    ids, tail = words_and_tail(prompt)
    save_cache(path, cache, model, tokenizer, {"tail": tail, "tokens": len(ids), "method": repr(method)})


def words_and_tail(prompt: Encoded) -> tuple[list[int], list[int]]:
    """The prompt up to the end of the user's words, and what the template says after them."""
    end = len(prompt.token_ids) - prompt.tail
    return prompt.token_ids[:end], prompt.token_ids[end:]
