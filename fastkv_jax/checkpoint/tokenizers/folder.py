"""The tokenizer of a folder, as transformers loads it: its tokenizer.json is what is believed.

Some of transformers' classes rebuild a tokenizer from its vocabulary with steps of their own instead of those in
tokenizer.json. Where that changes how a text is read, the file is loaded as it stands.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastkv_jax.checkpoint.quiet import quiet
from fastkv_jax.errors import CheckpointError, ModelWarning

_PROBES = ("Hello  world", "  leading", "a\nb\n\n c\t d ", "1234567 12.5", "don't DON'T", "é café e\u0301 ﬁ", "中文 字",
           "😀 👍🏽", "def f():\n    return 1\n")  # fmt: skip
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(folder: Path, name: str) -> Any:
    """A transformers tokenizer. Warns where its class had to be left aside.

    Raises `CheckpointError` with the source's `name` if there is none, or only one that needs code from the folder.
    """
    with quiet():  # importing transformers announces that PyTorch is missing
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder.absolute(), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # tokenizers in the field break in ways transformers has no class for
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"{name}: its tokenizer needs --trust-remote-code, code from the model folder,"
                    " which is never run; use a converted tokenizer.json"
                ) from error
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(f"{name}: no usable tokenizer: {reason[:300]}") from error
        if (folder / "tokenizer.json").is_file():
            tokenizer = _as_in_the_file(tokenizer, folder, name)
    if not tokenizer.is_fast:
        raise CheckpointError(f"{name}: {type(tokenizer).__name__} gives no character offsets; add a tokenizer.json")
    return tokenizer


def _as_in_the_file(tokenizer: Any, folder: Path, name: str) -> Any:
    """This tokenizer, unless it reads a text otherwise than tokenizer.json, or another that does as the file says."""
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:  # which changes nothing
        return tokenizer
    plain = _plain(folder)
    other = next((text for text in _probes(plain) if _reading(tokenizer, text) != _reading(plain, text)), None)
    if other is None:
        return tokenizer
    kind = type(tokenizer).__name__
    told = f"{name}: the class {kind} reads texts such as {other[:40]!r} otherwise than tokenizer.json, which is used"
    warnings.warn(told, ModelWarning, stacklevel=5)
    known = plain.get_vocab()
    named = {role: getattr(tokenizer, role) for role in _ROLES}
    missing = {role: text for role, text in named.items() if text in known and getattr(plain, role) is None}
    return _plain(folder, **missing) if missing else plain


def _plain(folder: Path, **roles: Any) -> Any:
    """What the file says, with the special tokens and the chat template of the files beside it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder.absolute(), local_files_only=True, **roles)


def _probes(tokenizer: Any) -> Iterator[str]:
    yield from _PROBES
    yield from (f"a{sign}b {sign} c" for sign in tokenizer.all_special_tokens)
    yield "a".join(tokenizer.get_added_vocab())


def _reading(tokenizer: Any, text: str) -> tuple[list[int], str] | None:
    """The text's tokens and their text; None if it cannot be read at all."""
    try:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids, tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    except Exception:  # the Rust side raises bare exceptions
        return None
