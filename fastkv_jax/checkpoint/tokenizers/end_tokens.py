"""Which tokens end an answer: decided here, from everything that a model's files say.

    declared    generation_config.json, config.json, or a GGUF file's own keys
    tokenizer   its end-of-sequence token
    template    what it writes behind an answer
    texts       special tokens that only ever end a text or a turn, unless they are said to be something else

Each of them ends an answer. Where the first three name different ones, or nothing but its text tells what ends a turn,
a line says so: a model whose end of turn nobody stops at talks on to its limit.
"""

import json
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from fastkv_jax.checkpoint.tokenizers.special_tokens import looks_special
from fastkv_jax.checkpoint.tokenizers.turn_ends import turn_ends
from fastkv_jax.errors import ModelWarning

Claim = tuple[str, tuple[int, ...]]  # who says so, and which tokens

TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]")
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eot|>", "<EOT>", "_<EOT>", "[EOT]",
             "<|end_of_turn|>", "<|turn_end|>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "[|endofturn|]",
             "<|endofturn|>", "<|END_OF_TURN_TOKEN|>", "<turn|>")  # fmt: skip
"""Texts that only ever end a text, or a turn."""


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

    def ids_of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Of those special tokens that there are."""
        return tuple(self.special[text] for text in texts if text in self.special)


def end_tokens(declared: Sequence[Claim], vocabulary: Vocabulary, vocab_size: int, source: str) -> tuple[int, ...]:
    """All tokens that end an answer, those declared first. Warns with a `ModelWarning` where the claims differ.

    Ids that the model cannot produce are left out, and said.
    """
    claims = [*declared, ("its tokenizer", vocabulary.ids_of([vocabulary.names.get("eos_token", "")]))]
    if vocabulary.template:
        told = turn_ends(vocabulary.template, vocabulary.names, vocabulary.special)
        claims.append(("its chat template", told))
    by_text, others = vocabulary.ids_of(TURN_ENDS), [vocabulary.names.get(f"{role}_token") for role in ("bos", "unk")]
    if not any(set(ids) & set(by_text) for _, ids in claims):  # nothing else tells what ends a turn
        claims.append(("the texts of its tokens", by_text))
    claims = [(who, ids) for who, ids in claims if ids]
    claimed = [token for _, ids in claims for token in ids]
    every = dict.fromkeys([*claimed, *by_text, *vocabulary.ids_of([text for text in TEXT_ENDS if text not in others])])
    ends = tuple(token for token in every if 0 <= token < vocab_size)
    if impossible := [str(token) for token in every if not 0 <= token < vocab_size]:
        _warn(f"{source}: end token {', '.join(impossible)} is outside the {vocab_size:,} tokens; not used")
    if claims and set(claimed) & set(ends) - set(claims[0][1]):
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
    more = [named.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    lists = [value.values() if isinstance(value, dict) else value for value in more if isinstance(value, (dict, list))]
    roles = {*names.values(), *(_text(value) for values in lists for value in values)}
    return Vocabulary(_special(folder, settings, roles), names, _template(folder, settings))


def _special(folder: epath.Path, settings: Mapping[str, Any], roles: Container[str | None]) -> dict[str, int]:
    """The ids of added tokens, of those that have a role, and of those whose text has a role of its own."""
    whole = read_json(folder / "tokenizer.json")
    found = {text: i for text, i in _vocabulary(folder, whole).items() if text in roles or looks_special(text)}
    found |= read_json(folder / "added_tokens.json")
    entries = [entry for entry in whole.get("added_tokens") or [] if isinstance(entry, dict)]
    found |= {text: entry.get("id") for entry in entries if (text := _text(entry))}
    added = settings.get("added_tokens_decoder")
    if isinstance(added, dict):
        found |= {text: int(i) for i, entry in added.items() if (text := _text(entry)) and i.isdecimal()}
    return {text: i for text, i in found.items() if type(i) is int}


def _vocabulary(folder: epath.Path, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """All texts with their ids, from tokenizer.json or, in older folders, vocab.json."""
    model = whole.get("model")
    known = model.get("vocab") if isinstance(model, dict) else read_json(folder / "vocab.json")
    if isinstance(known, list):  # pairs of text and score
        return {entry[0]: i for i, entry in enumerate(known) if isinstance(entry, list) and entry}
    return known if isinstance(known, dict) else {}


def _template(folder: epath.Path, settings: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text()
    except (OSError, UnicodeDecodeError):
        pass
    found = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several by name
        by_name = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = by_name.get("default") or (next(iter(by_name.values())) if len(by_name) == 1 else None)
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
