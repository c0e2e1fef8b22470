"""From a request to an answer: encode, prefill, decode, stop, time. Prints nothing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from fastkv_jax import text
from fastkv_jax.buckets import pad_batch
from fastkv_jax.chat_template import Rendering
from fastkv_jax.cli.asking.prompts import Request
from fastkv_jax.decoding import loop
from fastkv_jax.decoding.answers import Transcript
from fastkv_jax.decoding.sampling import Sampler
from fastkv_jax.errors import InputError
from fastkv_jax.methods import Method
from fastkv_jax.methods.plan import Kept, effective_budgets
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling import doors
from fastkv_jax.prefilling.doors import PrefillOptions
from fastkv_jax.prefilling.prompt import check_lengths

LONG_PROMPT = 2048  # columns from which a prefill reports its progress


@dataclass(frozen=True)
class PromptOptions:
    """How requests become tokens."""

    chat: bool
    max_new_tokens: int
    max_tokens: int  # prompt and answer together
    limit_name: str
    truncate: str | None
    split_special_tokens: bool
    window_at_question: bool
    rendering: Rendering


@dataclass
class Answer:
    """What came out for one request; times in seconds, compilation apart."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0
    bucket: int = 0
    kept: list[Kept] = field(default_factory=list)
    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def timings(self) -> dict[str, float]:
        """For machine-readable output."""
        return {name: round(getattr(self, name), 4) for name in ("compile_s", "prefill_s", "decode_s")}


@dataclass(frozen=True)
class Encoded:
    """A request as tokens. `window_end` is 0 where the window ends with the prompt; `cut` tokens were truncated."""

    token_ids: list[int]
    window_end: int
    cut: int
    tail: int = 0  # tokens of template after the user's words
    trimmed: str | None = None  # as of `EncodedPrompt`


def encode(tokenizer: Any, request: Request, config: LlamaConfig, options: PromptOptions) -> Encoded:
    """Tokens of a request, checked against the model's context; truncated only where that was asked for."""
    split = options.split_special_tokens
    if options.chat:
        encoded = text.encode_chat(
            tokenizer, request.prompt, request.system, request.prefill, split_special_tokens=split,
            rendering=options.rendering,
        )  # fmt: skip
    else:
        encoded = text.encode_raw(tokenizer, request.prompt, split_special_tokens=split)
    length = len(encoded.token_ids)
    if not length:
        raise InputError("prompt is empty")
    if length + options.max_new_tokens > options.max_tokens:
        if options.truncate is None:
            raise InputError(
                f"prompt has {length:,} tokens + {options.max_new_tokens:,} new > {options.max_tokens:,} "
                f"({options.limit_name}). Use --truncate middle, a shorter prompt, or fewer new tokens."
            )
        room = options.max_tokens - options.max_new_tokens
        if room < 1:
            raise InputError(f"--max-new-tokens {options.max_new_tokens:,} leaves no room in {options.max_tokens:,}")
        encoded = encoded.truncated(room, options.truncate)
    check_lengths(np.array([len(encoded.token_ids)]), config, options.max_new_tokens)
    window_end = encoded.window_end if options.window_at_question else 0
    ids, tail = encoded.token_ids, encoded.window_end
    cut, tail = length - len(ids), min(tail, len(ids) - 1)
    return Encoded(ids, min(window_end, len(ids) - 1), cut, tail, encoded.trimmed)


@dataclass(frozen=True)
class Engine:
    """A loaded model with its settings; `answer` runs one request."""

    model: Llama
    tokenizer: Any
    reading: PrefillOptions  # of every prompt, but for its window's end
    sampler: Sampler
    seed: int
    stops: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()  # beside the model's own

    @property
    def method(self) -> Method:
        """What is kept."""
        return self.reading["method"]

    def read(self, token_ids: list[int]) -> tuple[doors.Prefill, np.ndarray, np.ndarray]:
        """Prefill of a document alone, and its padded tokens and start."""
        tokens, start = pad_batch([token_ids])
        options: PrefillOptions = {**self.reading, "max_new_tokens": 0}
        result = doors.prefill(self.model, tokens, start, **options)
        return jax.block_until_ready(result), tokens, start

    def answer(
        self,
        prompt: Encoded,
        on_text: Callable[[str], object] = lambda piece: None,
        on_compile: Callable[[str, float], object] = lambda program, seconds: None,
        progress: Callable[[int], object] | None = None,
        on_prefill: Callable[[doors.Prefill, np.ndarray, np.ndarray], object] = lambda *read: None,
        row: int = 0,
    ) -> Answer:
        """Run a request; `on_text` gets each piece that is certain. Ctrl-C while decoding ends the answer early.

        `row` is its place among the requests: each samples with a key of its own, drawn from the seed.
        `on_prefill` gets the result, tokens and start before decoding takes the cache.
        """
        tokens, start = pad_batch([prompt.token_ids])
        answer = Answer(prompt_tokens=len(prompt.token_ids), bucket=tokens.shape[1])
        answer.kept = effective_budgets(
            self.method, answer.prompt_tokens, prompt.window_end, self.model.config.num_layers
        )
        result = self._prefill(answer, tokens, start, prompt.window_end, on_compile, progress)
        on_prefill(result, tokens, start)
        with _Timer() as timer:
            loop.compile_decode(self.model, result, **self._decode_options())
        answer.compile_s += timer.seconds
        on_compile("decode", timer.seconds)
        began = time.perf_counter()
        try:
            self._decode(answer, result, on_text, row)
        except KeyboardInterrupt:
            answer.finish_reason = "interrupted"
        answer.decode_s = time.perf_counter() - began
        return answer

    def _prefill(self, answer: Answer, tokens, start, window_end: int, on_compile, progress) -> doors.Prefill:
        options: PrefillOptions = {**self.reading, "window_end": window_end}
        prepared = doors.prepare(self.model, tokens, start, **options)
        report = progress if answer.bucket >= LONG_PROMPT else None
        with _Timer() as timer:
            prepared.compile(report)
        answer.compile_s += timer.seconds
        on_compile(f"prefill[{answer.bucket:,}]", timer.seconds)
        with _Timer() as timer:
            result = jax.block_until_ready(prepared.run(report))
        answer.prefill_s = timer.seconds
        return result

    def _decode_options(self) -> dict[str, Any]:
        ends = (*self.model.config.stop_tokens, *self.stop_tokens)
        return {"sampler": self.sampler, "stop_tokens": ends, "kernels": self.reading.get("kernels")}

    def _decode(self, answer: Answer, result: doors.Prefill, on_text: Callable[[str], object], row: int) -> None:
        said = Transcript(self.tokenizer, self.model.config.stop_tokens, stop_tokens=self.stop_tokens, stops=self.stops)

        def show(piece: str) -> None:
            answer.text, answer.finish_reason = said.text, said.finish or answer.finish_reason
            if piece:
                on_text(piece)

        key = jax.random.fold_in(jax.random.key(self.seed), row)
        options: dict[str, Any] = self._decode_options() | {"key": key}
        new = self.reading["max_new_tokens"]
        for chunk, _ in loop.decode_chunks(self.model, result, max_new_tokens=new, **options):
            for token in chunk[0].tolist():
                answer.token_ids.append(token)
                show(said.push(token))
                if said.finish:
                    return
        show(said.close())


class _Timer:
    def __enter__(self) -> "_Timer":
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
