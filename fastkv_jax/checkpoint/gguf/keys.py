"""The types of a GGUF file's metadata: each key that is read has the type that llama.cpp gives it, or the file is none.

Numbers of the architecture itself (`llama.block_count`) are checked where they are read, with their ranges.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastkv_jax.errors import CheckpointError


class Kind(NamedTuple):
    """What a value may be."""

    words: str
    types: frozenset[type]
    many: bool = False

    def holds(self, value: Any) -> bool:
        """Whether it is that: exactly, as true is no integer here."""
        if self.many:
            return isinstance(value, list) and set(map(type, value)) <= self.types
        return type(value) in self.types


TEXT, INTEGER = Kind("a text", frozenset({str})), Kind("an integer", frozenset({int}))
NUMBER, TRUTH = Kind("a number", frozenset({int, float})), Kind("true or false", frozenset({bool}))
TEXTS, INTEGERS = Kind("a list of strings", TEXT.types, many=True), Kind("a list of integers", INTEGER.types, many=True)
NUMBERS = Kind("a list of numbers", NUMBER.types, many=True)

KEYS = {
    "general.architecture": TEXT,
    **dict.fromkeys(("split.count", "split.no", "split.tensors.count"), INTEGER),
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"), TEXT),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), TEXTS),
    "tokenizer.ggml.token_type": INTEGERS,
    "tokenizer.ggml.scores": NUMBERS,
    **{f"tokenizer.ggml.{name}_token_id": INTEGER for name in ("bos", "eos", "eot", "eom", "padding", "unknown")},
    **{f"tokenizer.ggml.{name}": TRUTH for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
}


def check_types(metadata: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` naming the first key, with its value, that is of another type."""
    for key, kind in KEYS.items():
        if key in metadata and not kind.holds(metadata[key]):
            raise CheckpointError(f"{path}: {key} must be {kind.words}, found {repr(metadata[key])[:80]}")
