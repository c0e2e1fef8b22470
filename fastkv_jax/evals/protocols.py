"""LongBench as its authors run it, and as FastKV's reference code does: rules for whoever encodes prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastkv_jax.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """How a LongBench prompt becomes tokens and where its answer ends.

    `template` says when the chat template is put around the prompt: "after" truncation, so that it is whole, or
    "before", so that a truncated prompt loses every special token of it. `joins_text`: the halves of a truncated prompt
    are decoded, joined and encoded anew, so that two words can become one.
    """

    name: str
    template: Literal["after", "before"]
    bos: int  # how often BOS stands before a prompt with a template
    newline_stops: tuple[str, ...]  # tasks whose answer ends at a newline
    first_token_tasks: tuple[str, ...] | None  # those whose answer's first token is no end of text; None: every task
    end_tokens: Literal["generation_config", "tokenizer"]  # whose end-of-text tokens end an answer
    joins_text: bool = True

    def stop(self, task: str) -> tuple[str, ...]:
        """What ends an answer beside the end of text."""
        return ("\n",) if task in self.newline_stops else ()

    def min_new_tokens(self, task: str) -> int:
        """How many tokens an answer has before an end of text, or upstream's newline, may come."""
        return int(self.first_token_tasks is None or task in self.first_token_tasks)


UPSTREAM = Protocol(
    "upstream",
    template="after",
    bos=1,
    newline_stops=("samsum",),
    first_token_tasks=("samsum",),
    end_tokens="generation_config",
)
FASTKV = Protocol(
    "fastkv", template="before", bos=2, newline_stops=(), first_token_tasks=None, end_tokens="tokenizer"
)  # with float16 weights
PROTOCOLS = {protocol.name: protocol for protocol in (UPSTREAM, FASTKV)}


def truncate(tokens: Sequence[int], limit: int) -> list[int]:
    """The first and the last `limit // 2` tokens if there are more than `limit`; an odd limit leaves one unused.

    The limit is the prompt's alone: room for the answer is the caller's. Raises `InputError` below 2.
    """
    if limit < 2:
        raise InputError(f"a prompt can be truncated to 2 tokens or more, got {limit}")
    half = limit // 2
    return [*tokens[:half], *tokens[-half:]] if len(tokens) > limit else list(tokens)
