"""An answer as its tokens are made: text that is certain, up to an end token, a stop string or its length."""

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.text import decode

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token that is one byte of a character


class Transcript:
    """One answer. Its `text` is what is certain so far; `finish` says how it ended, None while it goes on.

    ends         tokens that end an answer: finish "eos"
    stop_tokens  tokens that the user has it stop at, stops texts: finish "stop"
    limit        tokens after which it has its length: finish "length"; None: until `close`

    `words` counts the tokens that the text is made of, without the one that ended it.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Collection[int],
        *,
        stop_tokens: Collection[int] = (),
        stops: Sequence[str] = (),
        limit: int | None = None,
    ):
        self._stream, self._matcher = TextStream(tokenizer), StopMatcher(stops)
        self._ends, self._stop_tokens, self._limit = ends, stop_tokens, limit
        self.text, self.words = "", 0
        self.finish: Literal["eos", "stop", "length"] | None = None

    def push(self, token: int) -> str:
        """The text that has become certain with this token; nothing after the end."""
        if self.finish is not None:
            return ""
        if token in self._stop_tokens or token in self._ends:
            self.finish = "stop" if token in self._stop_tokens else "eos"
            return self._rest()
        self.words += 1
        piece = self._show(self._stream.push(token))
        return piece + self.close() if self.words == self._limit else piece

    def close(self) -> str:
        """No more tokens come: the text that was held back."""
        if self.finish is not None:
            return ""
        self.finish = "length"
        return self._rest()

    def _rest(self) -> str:
        piece = self._show(self._stream.flush())
        held = self._matcher.flush()
        self.text += held
        return piece + held

    def _show(self, piece: str) -> str:
        safe, stopped = self._matcher.push(piece)
        self.text += safe
        if stopped:
            self.finish = "stop"
        return safe


class TextStream:
    """Turns token ids into text piece by piece: together they are what `decode` makes of all ids at once.

    Held back is what later tokens can change: an unfinished character, and a run of byte tokens, of which one that is
    no UTF-8 makes U+FFFD of them all. Special tokens are skipped, unless told otherwise.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._before: list[int] = []  # the last tokens shown: a decoder treats the first of a text differently
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        skipped = bool(self._held) and not self._decode([int(token)])  # in the middle of a run
        self._held.append(int(token))
        if skipped or self.is_byte(token):
            return ""
        whole = self._decode(self._before + self._held)
        return "" if whole.endswith("\ufffd") else self._show(whole)

    def flush(self) -> str:
        """What is held back, with U+FFFD for an incomplete character."""
        return self._show(self._decode(self._before + self._held))

    def is_byte(self, token: int) -> bool:
        """Whether a token is a byte of a character."""
        return _BYTE.fullmatch(self._tokenizer.backend_tokenizer.id_to_token(int(token)) or "") is not None

    def _show(self, whole: str) -> str:
        piece = whole[len(self._decode(self._before)) :]
        alone = self._decode(self._held)
        self._before = self._held if alone else self._before + self._held
        self._held = []
        return piece

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, skip_special_tokens=self._skip)


def split_stops(tokenizer: Any, stops: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(stop strings, stop tokens): special tokens are left out of an answer's text, where they would never be found.

    Raises `FastKVConfigError` for an empty one and for one that mixes a special token with text.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
    special = {token.content: number for number, token in added if token.special}
    strings, tokens = [], []
    for stop in stops:
        if not stop:
            raise FastKVConfigError("a stop string must not be empty")
        if (number := special.get(stop, special.get(stop.strip()))) is not None:
            tokens.append(number)
        elif inside := [text for text in special if text in stop]:
            raise FastKVConfigError(f"stop {stop!r} mixes the special token {inside[0]} with text; give each alone")
        else:
            strings.append(stop)
    return tuple(strings), tuple(dict.fromkeys(tokens))


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
