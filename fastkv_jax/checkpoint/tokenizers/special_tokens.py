"""Tokens that a file types as plain text though nothing could ever spell them: `<|im_start|>` is one token, or none."""

import json
import re
import warnings
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer

from fastkv_jax.checkpoint.assemble import listed
from fastkv_jax.errors import ModelWarning

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # as GGUF numbers the types of tokens
_LOOKS_SPECIAL = re.compile(
    r"<\|[^<>]+\|>|<｜[^<>]+｜>|\[\|[^\[\]]+\|\]|<\|\w[^\s<>]*>|<\w[^\s<>]*\|>|<(start|end)_of_\w+>|_?<EOT>|\[/?(INST|EOT)\]"
)
_TAG = re.compile(r"</?[A-Za-z_][\w.:-]*>")
_SIGNS = re.compile(r"<[^\s<>'\"{}]+>|\[/?[A-Z_]+\]")  # of a template's text


def looks_special(text: str) -> bool:
    """Whether nobody would write a token like this as text."""
    return text[:1] in "<[_" and _LOOKS_SPECIAL.fullmatch(text) is not None


def mend_special_tokens(tokenizer: Tokenizer, template: str | None, names: Iterable[str], source: str) -> None:
    """Add what the vocabulary holds as a whole but the tokenizer takes to pieces, and say so.

    Tokens that look special or have a role (`names`) become special; others that the chat template writes, and tags
    such as <think>, stay visible. Without this, a chat's signs reach the model as letters.
    """
    known = tokenizer.get_vocab(with_added_tokens=True)
    special = {text for text in known if looks_special(text)} | (set(names) & known.keys())
    signs = {text for text in _SIGNS.findall(template or "") if text in known}
    tags = {text for text in known if text.startswith("<") and _TAG.fullmatch(text)}
    written = {text for text in known if text in (template or "") and _is_punctuated(text)}
    broken = sorted(_never_cut(tokenizer, special | signs, tags | written), key=known.__getitem__)
    for text in broken:
        token = AddedToken(text, normalized=False, special=text in special)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if broken:
        warnings.warn(
            f"{source}: typed as plain text, but no text is ever cut into it, so read as one token: {listed(broken)}",
            ModelWarning,
            stacklevel=3,
        )


def _never_cut(tokenizer: Tokenizer, sure: set[str], likely: set[str]) -> set[str]:
    """Those that the tokenizer takes to pieces; of the `likely` ones only those that nothing is ever merged into."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    broken = {
        text
        for text in (sure | likely) - added
        if tokenizer.token_to_id(text) not in tokenizer.encode(text, add_special_tokens=False).ids
    }
    return broken if broken <= sure else broken - (_spelt(tokenizer) - sure)


def _is_punctuated(text: str) -> bool:
    """Whether it is neither a word nor mere punctuation: `[user]`, `### User:`."""
    return any(c.isalpha() for c in text) and any(not c.isalnum() and c not in "_▁Ġ " for c in text)


def _spelt(tokenizer: Tokenizer) -> set[str]:
    """The tokens that some text may be cut into: what merges make, or all, where there are none."""
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        return set(tokenizer.get_vocab(with_added_tokens=False))
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return {left + right for left, right in merges}
