"""A question of an evaluation, and what answers it: all that suites and the runner know of each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable


@dataclass(frozen=True)
class Sample:
    """One question: the prompt is `context + question`, in a chat template if `chat`, then the answer begins."""

    task: str
    id: str  # unique within the task
    context: str  # what many questions may share, and a method may compress without having seen them
    question: str  # the rest of the prompt
    answers: tuple[str, ...]  # any of them, or all of them, as the task's metric has it
    max_new_tokens: int  # 0: nothing is asked; `answers[0]` is how the text goes on, and its likelihood is measured
    prefill: str = ""  # the beginning of the answer, given
    chat: bool = True
    stop: tuple[str, ...] = ()  # the answer ends before any of these
    classes: tuple[str, ...] = ()  # what a classification chooses from
    group: str = ""  # what scores are also averaged over: a length, a needle's depth


class Encoded(NamedTuple):
    """A sample's prompt as tokens."""

    sample: Sample
    tokens: list[int]
    window_end: int  # tokens of template after the question; see `fastkv_jax.prefill`
    whole: int  # tokens before truncation; len(tokens) if nothing was cut


@runtime_checkable
class Engine(Protocol):
    """What answers: a model with a tokenizer and a method."""

    def encode(self, sample: Sample) -> Encoded:
        """The sample's prompt, truncated as the protocol says; raises `InputError` if it cannot be made to fit."""
        ...

    def answer(self, batch: Sequence[Encoded]) -> list[dict[str, Any]]:
        """For each, what JSON can hold: prediction (str), finish ("stop" or "length"), seconds, kept entries, ...

        Raises `MemoryError` if the device has no memory for them.
        """
        ...


@runtime_checkable
class Company(Protocol):
    """Several engines that answer the same prompts, and share what they can."""

    def encode(self, sample: Sample) -> Encoded:
        """The sample's prompt, as each of them reads it."""
        ...

    def answer_all(self, batch: Sequence[Encoded]) -> list[list[dict[str, Any]]]:
        """The answers of each engine, as `Engine.answer` gives them."""
        ...
