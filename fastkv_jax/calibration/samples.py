"""Questions with the answers that are expected, and where those stand in the prompt."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastkv_jax import text
from fastkv_jax.chat_template import Rendering
from fastkv_jax.errors import InputError


@dataclass(frozen=True)
class Sample:
    """A question with the answer expected.

    token_ids   the prompt, chat template included
    window_end  how many of them follow the question
    answer      token ids of the answer; empty if there is none
    """

    token_ids: tuple[int, ...]
    window_end: int = 0
    answer: tuple[int, ...] = ()

    @property
    def span(self) -> tuple[int, int] | None:
        """Where the answer stands in the prompt, [first, stop): its longest run there, None below half of it."""
        first, length = longest_run(self.token_ids, self.answer)
        return (first, first + length) if 2 * length >= max(len(self.answer), 1) else None


def longest_run(ids: Sequence[int], wanted: Sequence[int]) -> tuple[int, int]:
    """(first index, length) of the longest run of `ids` that is also a run of `wanted`; the first of several."""
    array, best = np.asarray(ids), (0, 0)
    runs = np.zeros(array.size + 1, np.int64)  # of tokens equal up to here, index shifted by one
    for token in wanted:
        runs[1:] = np.where(array == token, runs[:-1] + 1, 0)
        last = int(np.argmax(runs))
        best = max(best, (last - int(runs[last]), int(runs[last])), key=lambda run: (run[1], -run[0]))
    return best


def make_samples(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    rendering: Rendering = Rendering(),  # noqa: B008 - a frozen value
) -> list[Sample]:
    """Samples from rows with a prompt, an answer, and optionally the beginning of the answer as prefill.

    Through the chat template, told what `rendering` says, if there is one. An answer is tokenised as it stands in the
    prompt: with a space before it, where that finds more of it there. Raises `InputError` that names the row and the
    field.
    """
    samples = []
    for number, row in enumerate(rows, 1):
        for name in ("prompt", "answer"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(f"row {number}: {name} must be a text, found {row.get(name)!r}")
        if not isinstance(row.get("prefill"), str | None):
            raise InputError(f"row {number}: prefill must be a text, found {row['prefill']!r}")
        if text.has_chat_template(tokenizer):
            encoded = text.encode_chat(tokenizer, row["prompt"], prefill=row.get("prefill"), rendering=rendering)
        else:
            encoded = text.encode_raw(tokenizer, row["prompt"] + (row.get("prefill") or ""))
        samples.append(
            Sample(tuple(encoded.token_ids), encoded.window_end, _answer_ids(tokenizer, encoded, row["answer"]))
        )
    return samples


def _answer_ids(tokenizer: Any, prompt: text.EncodedPrompt, answer: str) -> tuple[int, ...]:
    ways = [tokenizer(space + answer.strip(), add_special_tokens=False)["input_ids"] for space in ("", " ")]
    return tuple(max(ways, key=lambda ids: longest_run(prompt.token_ids, ids)[1] / len(ids)))


def digest(samples: Sequence[Sample]) -> str:
    """The sha256 of what was asked and expected."""
    plain = [[list(map(int, s.token_ids)), int(s.window_end), list(map(int, s.answer))] for s in samples]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
