"""Text in and out: tokenizers, chat prompts, streamed text, stop strings."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers.decoders import DecodeStream

from fastkv_jax.checkpoint import Resolved, orbax, resolve
from fastkv_jax.checkpoint.quiet import quiet
from fastkv_jax.config import LlamaConfig
from fastkv_jax.errors import CheckpointError, FastKVConfigError, InputError

MAX_TEMPLATE_CHARACTERS = 1_000_000
"""What a chat template may add to the messages. Templates come with the model; a loop in one can render gigabytes."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids: the user's words are [first, end), the template's tokens surround them.

    <|im_start|> user \\n  Who ?  <|im_end|> \\n <|im_start|> assistant \\n      first 3, end 5, window_end 5
    """

    token_ids: list[int]
    first: int
    end: int

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
        return EncodedPrompt(ids, self.first, self.first + room)


def load_tokenizer(source: str | os.PathLike[str] | Resolved) -> Any:
    """The tokenizer of any source that `load_model` accepts, as a transformers tokenizer.

    Raises `CheckpointError` if files are missing or damaged, or if it would need code from the model folder.
    """
    found = source if isinstance(source, Resolved) else resolve(source)
    if found.kind == "gguf":
        return _from_gguf(Path(found.path))
    if orbax.is_remote(found.path):  # transformers reads local folders only
        with tempfile.TemporaryDirectory() as scratch:
            orbax.copy_tokenizer_files(found.path)(epath.Path(scratch))
            return _from_folder(Path(scratch), os.fspath(found.path))
    return _from_folder(Path(found.path), os.fspath(found.path))


def check_vocabulary(tokenizer: Any, config: LlamaConfig) -> None:
    """Raise `CheckpointError` if the tokenizer can produce ids that the embedding does not have."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {size} ids, the model's embedding only {config.vocab_size} rows")


def has_chat_template(tokenizer: Any) -> bool:
    """Whether `encode_chat` can be used."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_raw(tokenizer: Any, text: str, *, split_special_tokens: bool = False) -> EncodedPrompt:
    """A text without a template: with BOS if the tokenizer adds it, once even if the text brings its own."""
    ids = list(tokenizer(text, verbose=False, split_special_tokens=split_special_tokens)["input_ids"])
    ids = ids[1:] if ids[:1] == ids[1:2] == [tokenizer.bos_token_id] else ids
    return EncodedPrompt(ids, 0, len(ids))


def continue_with(tokenizer: Any, text: str, *, split_special_tokens: bool = False) -> list[int]:
    """Tokens of a text that goes on where another has ended."""
    return list(
        tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=split_special_tokens)["input_ids"]
    )


def encode_chat(
    tokenizer: Any,
    prompt: str,
    system: str | None = None,
    prefill: str | None = None,
    *,
    split_special_tokens: bool = False,
) -> EncodedPrompt:
    """A one-question chat, ready for the answer, which starts with `prefill` if that is given.

    Texts of special tokens in the prompt become those tokens, as everywhere in the field, unless
    `split_special_tokens`. Raises `InputError` if there is no template, or it refuses the messages or renders too much.
    """
    if not has_chat_template(tokenizer):
        raise InputError("this tokenizer has no chat template; use --raw")
    if not prompt.strip():
        raise InputError("prompt is empty")
    rendered = _render(tokenizer, prompt, system)
    end = _question_end(tokenizer, rendered, prompt, system)
    first = next((end - len(text) for text in (prompt, prompt.strip()) if rendered[:end].endswith(text)), 0)
    text = rendered + (prefill or "")

    # The template writes BOS itself where the model wants one.
    def encode(part: str, split: bool = False) -> Any:
        options = {"add_special_tokens": False, "verbose": False, "split_special_tokens": split}
        return tokenizer(part, return_offsets_mapping=True, **options)

    if split_special_tokens:
        head, tail = encode(text[:first])["input_ids"], encode(text[end:])["input_ids"]
        words = encode(text[first:end], split=True)["input_ids"]
        return EncodedPrompt([*head, *words, *tail], len(head), len(head) + len(words))
    encoded = encode(text)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return EncodedPrompt(list(encoded["input_ids"]), sum(s < first for s in starts), sum(s < end for s in starts))


class TextStream:
    """Turns token ids into text piece by piece; a piece never ends inside a character. Special tokens are skipped."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self._ids.append(int(token))
        piece = self._decoder.step(self._tokenizer.backend_tokenizer, int(token)) or ""
        self._text += piece
        return piece

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for an incomplete character."""
        full = self._tokenizer.backend_tokenizer.decode(self._ids, skip_special_tokens=True)
        rest = full[len(self._text) :] if full.startswith(self._text) else ""
        self._text += rest
        return rest


class StopMatcher:
    """Cuts streamed text at the first stop string that completes. Possible beginnings of one are held back."""

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise FastKVConfigError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is safe to print after this piece, and whether a stop string has been found."""
        if self._stopped:
            return "", True
        text = self._held + piece
        # The match that ends first, the longer one of two: the same however the text is cut into pieces.
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if found:
            end, length = min(found)
            self._held, self._stopped = "", True
            return text[: end + length], True
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that some stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


def _from_folder(folder: Path, name: str) -> Any:
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
    if not tokenizer.is_fast:
        raise CheckpointError(f"{name}: {type(tokenizer).__name__} gives no character offsets; add a tokenizer.json")
    return tokenizer


def _from_gguf(path: Path) -> Any:
    from fastkv_jax.checkpoint.gguf_tokenizer import read_tokenizer

    tokenizer, names = read_tokenizer(path)
    with quiet():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="left", **names
        )


def render_chat(tokenizer: Any, prompt: str) -> str:
    """The text that a one-question chat becomes, BOS included where the template writes one."""
    return _render(tokenizer, prompt, None)


def _render(tokenizer: Any, prompt: str, system: str | None) -> str:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"the model's chat template failed: {error or type(error).__name__}") from error
    added = len(rendered) - len(prompt) - len(system or "")
    if added > MAX_TEMPLATE_CHARACTERS:
        raise InputError(
            f"the model's chat template adds {added} characters, more than {MAX_TEMPLATE_CHARACTERS}; use --raw"
        )
    return rendered


def _question_end(tokenizer: Any, rendered: str, prompt: str, system: str | None) -> int:
    """Where the user's question ends in the rendered text.

    Everything after it comes from the template, so it is found by rendering another question and comparing the ends.
    """
    marker = "question"
    while marker in prompt or marker in (tokenizer.chat_template or "") or marker in (system or ""):
        marker += "Z"
    other = _render(tokenizer, marker, system)
    tail = other[other.rfind(marker) + len(marker) :] if marker in other else None
    if tail is not None and rendered.endswith(tail):
        return len(rendered) - len(tail)
    for content in (prompt, prompt.strip()):  # the tail depends on the question
        if content in rendered:
            return rendered.rindex(content) + len(content)
    return len(rendered)
