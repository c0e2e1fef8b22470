"""Text in and out: tokenizers, chat prompts, decoded tokens."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from etils import epath

from fastkv_jax.chat_template import Rendering, has_chat_template, render
from fastkv_jax.checkpoint import Resolved, orbax, resolve
from fastkv_jax.checkpoint.quiet import quiet
from fastkv_jax.checkpoint.tokenizers.folder import read_tokenizer
from fastkv_jax.checkpoint.tokenizers.special_tokens import mend_special_tokens
from fastkv_jax.errors import CheckpointError, InputError, ModelWarning
from fastkv_jax.model.config import LlamaConfig

_SPACES = ("▁", "Ġ")  # how tokenizers write a space
_STARTS = ("\n", "\ue000")  # beginnings that hardly merge with what follows: of the second only its bytes are tokens


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids: the user's words are [first, end), the template's tokens surround them.

    <|im_start|> user \\n  Who ?  <|im_end|> \\n <|im_start|> assistant \\n      first 3, end 5, window_end 5
    """

    token_ids: list[int]
    first: int
    end: int
    trimmed: str | None = None  # white space that the template left out behind the words; None: it leaves none out

    @property
    def window_end(self) -> int:
        """Tokens that follow the question."""
        return len(self.token_ids) - self.end

    def truncated(self, limit: int, side: str) -> "EncodedPrompt":
        """At most `limit` tokens, by cutting the user's words at their "left", "right" or in the "middle".

        Raises `InputError` if the template alone is longer.
        """
        excess = len(self.token_ids) - limit
        if excess <= 0:
            return self
        words = self.token_ids[self.first : self.end]
        room = len(words) - excess
        if room < 1:
            raise InputError(f"the template alone has {len(self.token_ids) - len(words)} tokens; {limit} are allowed")
        front = {"left": 0, "right": room, "middle": (room + 1) // 2}[side]
        words = words[:front] + words[len(words) - (room - front) :]
        ids = self.token_ids[: self.first] + words + self.token_ids[self.end :]
        return replace(self, token_ids=ids, end=self.first + room)


def load_tokenizer(source: str | os.PathLike[str] | Resolved) -> Any:
    """The tokenizer of any source that `load_model` accepts, as a transformers tokenizer.

    If the source was resolved with another tokenizer, that one. Warns with a `ModelWarning` of what is doubtful.

    Args:
        source: as of `load_model`

    Raises:
        CheckpointError: if files are missing or damaged, or if it would need code from the model folder
    """
    found = source if isinstance(source, Resolved) else resolve(source)
    found = found.tokenizer or found
    tokenizer = _load(found)
    names = [str(name) for name in tokenizer.special_tokens_map.values()]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    mend_special_tokens(tokenizer.backend_tokenizer, template, names, os.fspath(found.path))
    return tokenizer


def _load(found: Resolved) -> Any:
    if found.kind == "gguf":
        return _from_gguf(Path(found.path))
    if orbax.is_remote(found.path):  # transformers reads local folders only
        with tempfile.TemporaryDirectory() as scratch:
            orbax.copy_tokenizer_files(found.path)(epath.Path(scratch))
            return read_tokenizer(Path(scratch), os.fspath(found.path))
    return read_tokenizer(Path(found.path), os.fspath(found.path))


def check_vocabulary(tokenizer: Any, config: LlamaConfig) -> None:
    """Raise `CheckpointError` if the tokenizer can produce ids that the embedding does not have."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {size} ids, the model's embedding only {config.vocab_size} rows")


def encode_raw(tokenizer: Any, text: str, *, split_special_tokens: bool = False) -> EncodedPrompt:
    """A text without a template: with BOS if the tokenizer adds it, once even if the text brings its own."""
    ids = list(tokenizer(text, verbose=False, split_special_tokens=split_special_tokens)["input_ids"])
    ids = ids[1:] if ids[:1] == ids[1:2] == [tokenizer.bos_token_id] else ids
    return EncodedPrompt(ids, 0, len(ids))


def continue_with(tokenizer: Any, text: str, *, split_special_tokens: bool = False) -> list[int]:
    """Tokens of a text that goes on where another has ended: no BOS, and no space that nobody wrote.

    Tokenizers of sentencepiece's kind put a space before every text they are given, as if it began a sentence.
    """

    def encode(part: str) -> list[int]:
        options = {"add_special_tokens": False, "verbose": False, "split_special_tokens": split_special_tokens}
        return list(tokenizer(part, **options)["input_ids"])

    if not text or not _puts_a_space_before(tokenizer):
        return encode(text)
    for start in _STARTS:
        before, both = encode(start), encode(start + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return encode(text)


def _puts_a_space_before(tokenizer: Any) -> bool:
    """Whether a text without a space is read as one with a space."""
    tokens = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith(_SPACES)


def encode_chat(
    tokenizer: Any,
    prompt: str,
    system: str | None = None,
    prefill: str | None = None,
    *,
    split_special_tokens: bool = False,
    rendering: Rendering = Rendering(),  # noqa: B008 - a frozen value
) -> EncodedPrompt:
    """A one-question chat, ready for the answer, which starts with `prefill` if that is given.

    Texts of special tokens in the prompt become those tokens, as everywhere in the field, unless
    `split_special_tokens`. Warns if the template changes the question's words. Raises `InputError` if there is no
    template, or it refuses the messages, leaves one out or renders too much.
    """
    if not has_chat_template(tokenizer):
        raise InputError("this tokenizer has no chat template; use --raw")
    if not prompt.strip():
        raise InputError("prompt is empty")
    rendering = replace(rendering, moment=rendering.moment or datetime.now())  # one for all that is rendered here
    rendered = render(tokenizer, _messages(prompt, system), rendering)
    if prompt.strip() not in rendered:
        warnings.warn("the model's chat template changes the words of the prompt", ModelWarning, stacklevel=2)
    end, trims = _question_end(tokenizer, rendered, prompt, system, rendering)
    trimmed = prompt[len(prompt.rstrip()) :] if trims else None
    first = next((end - len(text) for text in (prompt, prompt.strip()) if rendered[:end].endswith(text)), 0)
    text = rendered + (prefill or "")

    # The template writes BOS itself where the model wants one.
    def encode(part: str) -> Any:
        return tokenizer(part, return_offsets_mapping=True, add_special_tokens=False, verbose=False)

    if split_special_tokens:
        head = encode(text[:first])["input_ids"]
        words = continue_with(tokenizer, text[first:end], split_special_tokens=True)
        ids = [*head, *words, *continue_with(tokenizer, text[end:])]
        return EncodedPrompt(ids, len(head), len(head) + len(words), trimmed)
    encoded = encode(text)
    starts = [start for start, _ in encoded["offset_mapping"]]
    first, end = (sum(s < place for s in starts) for place in (first, end))
    return EncodedPrompt(list(encoded["input_ids"]), first, end, trimmed)


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of some tokens, the same that a `TextStream` gives in pieces."""
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _from_gguf(path: Path) -> Any:
    from fastkv_jax.checkpoint.gguf.tokenizer import read_tokenizer as read_gguf

    tokenizer, names = read_gguf(path)
    with quiet():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="left", **names
        )


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _question_end(
    tokenizer: Any, rendered: str, prompt: str, system: str | None, rendering: Rendering
) -> tuple[int, bool]:
    """Where the user's question ends in the rendered text, and whether the template leaves out white space around it.

    Everything after it comes from the template, so it is found by rendering another question and comparing the ends.
    """
    marker = "question"
    while marker in prompt or marker in (tokenizer.chat_template or "") or marker in (system or ""):
        marker += "Z"
    spaced = f"{marker} \n"
    other = render(tokenizer, _messages(spaced, system), rendering)
    trims = spaced not in other
    words = marker if trims else spaced
    tail = other[other.rfind(words) + len(words) :] if words in other else None
    if tail is not None and rendered.endswith(tail):
        return len(rendered) - len(tail), trims
    for content in (prompt, prompt.strip()):  # the tail depends on the question
        if content in rendered:
            return rendered.rindex(content) + len(content), trims
    return len(rendered), trims
