"""Which tokens end an answer: decided here, from everything that a model's files say.

    declared    generation_config.json, config.json, or a GGUF file's own keys
    tokenizer   its end-of-sequence token
    template    what it writes behind an answer

Each of them ends an answer. Where they name different ones, a line says so: a model whose end of turn nobody stops at
talks on to its limit.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from fastkv_jax.checkpoint.turn_ends import turn_ends
from fastkv_jax.errors import ModelWarning

Claim = tuple[str, tuple[int, ...]]  # who says so, and which tokens

TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eot|>", "<EOT>", "_<EOT>", "[EOT]",
             "<|end_of_turn|>", "<|turn_end|>", "<end_of_utterance>", "<|eom_id|>")  # fmt: skip
"""Texts that only ever end a turn, for files that have no place to say so."""


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's files say of its special tokens."""

    special: Mapping[str, int] = field(default_factory=dict)  # ids by their texts
    names: Mapping[str, str] = field(default_factory=dict)  # texts by their roles: eos_token, bos_token, ...
    template: str | None = None  # of a chat

    def text_of(self, token: int) -> str:
        """The token as people know it."""
        texts = [text for text, number in self.special.items() if number == token]
        return f"{texts[0]} ({token})" if texts else str(token)


def end_tokens(declared: Sequence[Claim], vocabulary: Vocabulary, vocab_size: int, source: str) -> tuple[int, ...]:
    """All tokens that end an answer, those declared first. Warns with a `ModelWarning` where the claims differ.

    Ids that the model cannot produce are left out, and said.
    """
    eos = vocabulary.special.get(vocabulary.names.get("eos_token", ""))
    claims = [*declared, ("its tokenizer", () if eos is None else (eos,))]
    if vocabulary.template:
        claims.append(("its chat template", turn_ends(vocabulary.template, vocabulary.names, vocabulary.special)))
    claims = [(who, ids) for who, ids in claims if ids]
    every = dict.fromkeys(token for _, ids in claims for token in ids)
    ends = tuple(token for token in every if 0 <= token < vocab_size)
    if impossible := [str(token) for token in every if not 0 <= token < vocab_size]:
        _warn(f"{source}: end token {', '.join(impossible)} is outside the {vocab_size:,} tokens; not used")
    if claims and set(ends) - set(claims[0][1]):
        told = "; ".join(f"{who} {' and '.join(map(vocabulary.text_of, ids))}" for who, ids in claims)
        _warn(f"{source}: its files name different end tokens, each of which ends an answer: {told}")
    return ends


def _warn(message: str) -> None:
    warnings.warn(message, ModelWarning, stacklevel=4)


def vocabulary_of_folder(folder: epath.Path) -> Vocabulary:
    """From a tokenizer's JSON files, without loading it. What is missing or damaged says nothing here."""
    settings = read_json(folder / "tokenizer_config.json")
    named = {**read_json(folder / "special_tokens_map.json"), **settings}
    names = {role: text for role, value in named.items() if role.endswith("_token") and (text := _text(value))}
    return Vocabulary(_special(folder, settings, names), names, _template(folder, settings))


def _special(folder: epath.Path, settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """The ids of added tokens and of those that have a role."""
    added = settings.get("added_tokens_decoder")
    if isinstance(added, dict) and added:
        return {text: int(number) for number, entry in added.items() if (text := _text(entry)) and number.isdecimal()}
    whole = read_json(folder / "tokenizer.json")
    entries, model = whole.get("added_tokens") or [], whole.get("model")
    found = {text: entry.get("id") for entry in entries if (text := _text(entry)) and isinstance(entry, dict)}
    known = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(known, dict):
        found = {text: known.get(text) for text in names.values()} | found
    return {text: number for text, number in found.items() if type(number) is int}


def _template(folder: epath.Path, settings: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text()
    except (OSError, UnicodeDecodeError):
        pass
    found = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several by name
        by_name = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = by_name.get("default")
    return found if isinstance(found, str) else None


def _text(value: Any) -> str | None:
    """Of a token, given as a text or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def read_json(file: epath.Path) -> dict[str, Any]:
    """An object from a file; an empty one if it is missing or damaged."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
