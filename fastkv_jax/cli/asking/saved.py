"""A saved cache on the command line: a document read once, asked about many times.

The document is read up to where its words end. What the chat template says after them is kept in the file's note, so
that a later question goes on in the same message: document, newline, question, template's end. Last words that would be
other tokens with a newline after them (a full stop and a newline can be one) wait in the note, too: then the tokens are
those of document and question read at once. So does white space that a template leaves out at the end of a message.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkv_jax import text
from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.cache.on_disk import load_cache, load_note, save_cache
from fastkv_jax.cli.asking.answering import Encoded
from fastkv_jax.cli.asking.prompts import Request
from fastkv_jax.errors import CheckpointError, InputError
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.prompt import check_lengths

_LOOKED_AT = 16  # tokens at the end of a document
_BEGINNINGS = ("\na", "\n a", "\n\na")  # of what may follow it


@dataclass(frozen=True)
class Saved:
    """What the note of a cache file says."""

    path: Path
    rest: str  # the end of the document's words, not yet read
    tail: list[int]  # the template's tokens after the user's words
    tokens: int  # of the document
    method: str
    trims: bool = False  # the template leaves out white space around words

    @classmethod
    def read(cls, path: str) -> "Saved":
        """From a file that `save` wrote, or `CheckpointError`."""
        note = load_note(path)
        if not {"rest", "tail", "tokens", "method", "trims"} <= note.keys():
            raise CheckpointError(f"{path} was not written by --save-cache of this version; write it again")
        return cls(Path(path), note["rest"], note["tail"], note["tokens"], note["method"], note["trims"])

    def check_chat(self, *, chat: bool, raw: bool) -> None:
        """Raise `InputError` if a flag asks for another way than the document was read in."""
        if raw if self.tail else chat:
            how = "with" if self.tail else "without"
            raise InputError(
                f"{self.path} was read {how} a chat template, and its questions are too; leave the flag out"
            )

    def load(self, model: Llama, tokenizer: Any) -> KVCache:
        """The cache, or `CheckpointError` if it belongs to another model or tokenizer."""
        return load_cache(self.path, model, tokenizer)

    def encode(self, tokenizer: Any, request: Request, config: LlamaConfig, new: int, split: bool) -> Encoded:
        """A question as the end of the document's message. Raises `InputError` where it does not fit."""
        if request.system:
            raise InputError("--load-cache has no place for a system message: the conversation has begun")
        question = request.prompt.rstrip() if self.trims else request.prompt
        words = text.continue_with(tokenizer, f"{self.rest}\n{question}", split_special_tokens=split)
        begun = text.continue_with(tokenizer, request.prefill) if request.prefill else []
        ids = [*words, *self.tail, *begun]
        check_lengths(np.array([self.tokens + len(ids)]), config, new)
        return Encoded(ids, 0, 0)


def save(path: str, cache: KVCache, model: Llama, tokenizer: Any, prompt: Encoded, method: Any) -> None:
    """Write the cache of a prompt whose words have been read."""
    ids, rest, tail = parts(tokenizer, prompt)
    note = {"rest": text.decode(tokenizer, rest, skip_special_tokens=False) + (prompt.trimmed or ""), "tail": tail}
    note |= {"tokens": len(ids), "method": repr(method), "trims": prompt.trimmed is not None}
    save_cache(path, cache, model, tokenizer, note)


def parts(tokenizer: Any, prompt: Encoded) -> tuple[list[int], list[int], list[int]]:
    """The prompt's words, those at their end that a newline after them would change, and what the template adds."""
    end = len(prompt.token_ids) - prompt.tail
    words, tail = prompt.token_ids[:end], prompt.token_ids[end:]
    last = text.decode(tokenizer, words[-_LOOKED_AT:], skip_special_tokens=False)
    alone = text.continue_with(tokenizer, last)
    follows = [text.continue_with(tokenizer, last + beginning) for beginning in _BEGINNINGS]
    waits = len(alone) - len(os.path.commonprefix([alone, *follows]))
    if words[-1] in tokenizer.backend_tokenizer.get_added_tokens_decoder():
        waits = max(waits, 1)  # what follows one may be read as a beginning
    if waits >= len(words) or words[len(words) - waits :] != alone[len(alone) - waits :] or "\ufffd" in last:
        waits = 0  # a text whose end cannot be told from its tokens
    return words[: end - waits], words[end - waits :], tail
