"""What answers an evaluation's questions: a model, a tokenizer, a method; batches of ragged rows."""

import dataclasses
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastkv_jax import text
from fastkv_jax.buckets import bucket_for, pad_batch
from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.chat_template import Rendering
from fastkv_jax.costs import full_cache_bytes, prefill_flops
from fastkv_jax.decoding import loop
from fastkv_jax.decoding.answers import Transcript, split_stops
from fastkv_jax.decoding.sampling import Greedy, Sampler
from fastkv_jax.errors import InputError
from fastkv_jax.evals import prompts
from fastkv_jax.evals.protocols import Protocol
from fastkv_jax.evals.running.memory_maps import forget_programs_if_many
from fastkv_jax.evals.sample import Encoded, Sample
from fastkv_jax.methods import FullKV, Method
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.platforms import Kernels
from fastkv_jax.model.sharding import DATA
from fastkv_jax.prefilling import doors
from fastkv_jax.prefilling.adaptive import Adaptive
from fastkv_jax.prefilling.likelihood import next_token_scores
from fastkv_jax.prefilling.many_methods import prefill_all
from fastkv_jax.prefilling.prompt import static_tail

COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class ModelEngine:
    """Answers prompts, greedily unless a sampler is given.

    Fields of an answer, beside prediction and finish ("stop" or "length"):

    ttft_s          seconds to the first token: prefill of the batch this row was in, and a token; compilation apart
    token_s         seconds per later token of that batch
    prefill_flops   of this row, a share of full context's
    kv_bytes        of the entries it keeps, a share of full context's in the model's dtype
    compiled        programs compiled for this batch
    nll             of a text to be read on (`max_new_tokens` 0): mean negative log-likelihood of its tokens, in nats
    """

    model: Llama
    tokenizer: Any
    method: Method
    max_tokens: int  # prompt and answer together
    window_at_question: bool = True  # the observation window ends with the question, not with the template
    query_aware: bool = True  # False: the context is compressed before the question is read
    protocol: Protocol | None = None  # how prompts are cut and answers end; None: ours
    published_ends: tuple[int, ...] = ()  # of the protocol that stops where generation_config.json says
    kernels: Kernels | None = None
    kv_dtype: str | None = None
    rendering: Rendering = Rendering()
    sampler: Sampler = Greedy()
    seed: int = 0
    seen: set[tuple[int, ...]] = field(default_factory=set, init=False, compare=False, repr=False)

    def encode(self, sample: Sample) -> Encoded:
        """The sample's prompt; what is too long with its answer is cut, which the record shows."""
        answer = sample.max_new_tokens or len(self._rest(sample))
        return prompts.encode(self.tokenizer, sample, self.max_tokens - answer, self.protocol, self.rendering)

    def _rest(self, sample: Sample) -> list[int]:
        return text.continue_with(self.tokenizer, sample.answers[0])

    def answer(self, batch: Sequence[Encoded]) -> list[dict[str, Any]]:
        """Answers of one batch; raises `MemoryError` if it does not fit on the device."""
        forget_programs_if_many()
        with _memory_errors():
            return self._answer(self._filled(batch))[: len(batch)]

    def _filled(self, batch: Sequence[Encoded]) -> list[Encoded]:
        """The batch with its last row again, until every device of a mesh has rows."""
        mesh = self.model.mesh
        spare = -len(batch) % (1 if mesh is None else mesh.shape.get(DATA, 1))
        return [*batch, *[batch[-1]] * spare]

    def _answer(self, batch: Sequence[Encoded]) -> list[dict[str, Any]]:
        before = _compilations()
        new = max(prompt.sample.max_new_tokens for prompt in batch)
        columns, ends = bucket_for(max(len(prompt.tokens) for prompt in batch)), self._window_ends(batch)
        shape = (len(batch), columns, new, static_tail(ends))
        if shape not in self.seen:
            self._prepared(batch, new).compile()
            self.seen.add(shape)
        began = time.perf_counter()
        result = jax.block_until_ready(self._prepared(batch, new).run())
        return self._go_on(result, batch, new, before, time.perf_counter() - began)

    def _go_on(
        self, result: doors.Prefill, batch: Sequence[Encoded], new: int, before: int, prefill_s: float | None
    ) -> list[dict[str, Any]]:
        """The answers after a prefill of so many seconds, None if they are nobody's alone."""
        kept = result.cache.entry_bytes()
        if new:
            rows, times = self._decode(result, batch, new, prefill_s)
        else:
            rows = self._likelihoods(result.cache, batch)
            times = {} if prefill_s is None else {"ttft_s": prefill_s}
        costs = [self._costs(len(prompt.tokens), int(bytes)) for prompt, bytes in zip(batch, kept, strict=True)]
        more = {**times, "rows": len(batch), "compiled": _compilations() - before}
        return [{**row, **cost, **more} for row, cost in zip(rows, costs, strict=True)]

    def _prepared(self, batch: Sequence[Encoded], new: int) -> doors.Prepared:
        """The prefill; where the context is compressed before the question is read, the question's."""
        prepare = partial(doors.prepare, self.model, kernels=self.kernels, kv_dtype=self.kv_dtype)
        if self.query_aware or not new:
            tokens, start, ends = self._batched(batch)
            return prepare(tokens, start, method=self.method, max_new_tokens=new, window_end=ends)
        parts = [self._split(prompt) for prompt in batch]
        context = prepare(*pad_batch([context for context, _ in parts]), method=self.method, max_new_tokens=0).run()
        question = pad_batch([question for _, question in parts])
        return prepare(*question, method=FullKV(), max_new_tokens=new, cache=context.cache)

    def _batched(self, batch: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, start and window_end, as prefill takes them."""
        tokens, start = pad_batch([prompt.tokens for prompt in batch])
        return tokens, start, self._window_ends(batch)

    def _window_ends(self, batch: Sequence[Encoded]) -> np.ndarray:
        return np.array([prompt.window_end * self.window_at_question for prompt in batch], np.int32)

    def _split(self, prompt: Encoded) -> tuple[list[int], list[int]]:
        """Context and question; the template behind the question goes with it."""
        sample = prompt.sample
        words = sample.question if sample.chat else sample.question + sample.prefill
        asked = len(text.continue_with(self.tokenizer, words))
        at = len(prompt.tokens) - prompt.window_end - asked
        if not 0 < at < len(prompt.tokens):
            raise InputError(f"{sample.task} {sample.id}: no context before the question")
        return prompt.tokens[:at], prompt.tokens[at:]

    def _decode(
        self, result, batch: Sequence[Encoded], new: int, prefill_s: float | None
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The answers, and seconds to the first token, if the prefill's are known, and of each later one."""
        said = [self._transcript(prompt.sample) for prompt in batch]
        result = self._with_a_first_token(result, batch)
        options: dict[str, Any] = {"kernels": self.kernels, "stop_tokens": self._ends(), "sampler": self.sampler}
        loop.compile_decode(self.model, result, **options)
        made, began, first_at = 0, time.perf_counter(), 0.0
        for chunk, _ in loop.decode_chunks(self.model, result, max_new_tokens=new, key=self._key(batch), **options):
            first_at = first_at or time.perf_counter()
            made += chunk.shape[1]
            for row, tokens in zip(said, chunk, strict=True):
                for token in tokens.tolist():
                    row.push(token)
            if all(row.finish for row in said):
                break
        times = {"token_s": (time.perf_counter() - first_at) / (made - 1) if made > 1 else 0.0}
        rows = [
            {"prediction": row.text, "finish": "length" if row.finish == "length" else "stop", "new_tokens": row.words}
            for row in said
        ]
        return rows, times if prefill_s is None else {"ttft_s": prefill_s + first_at - began, **times}

    def _transcript(self, sample: Sample) -> Transcript:
        stops, stop_tokens = split_stops(self.tokenizer, sample.stop)
        limit = sample.max_new_tokens
        return Transcript(self.tokenizer, self._ends(), stop_tokens=stop_tokens, stops=stops, limit=limit)

    def _key(self, batch: Sequence[Encoded]) -> Any:
        """The batch's own, the same whenever it is asked again."""
        first = batch[0].sample
        return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(f"{first.task} {first.id}".encode()))

    def _ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        if self.protocol is None:
            return self.model.config.stop_tokens
        if self.protocol.end_tokens == "tokenizer" and self.tokenizer.eos_token_id is not None:
            return (int(self.tokenizer.eos_token_id),)
        return self.published_ends or self.model.config.stop_tokens

    def _with_a_first_token(self, result: doors.Prefill, batch: Sequence[Encoded]) -> doors.Prefill:
        """Logits under which answers do not end before they begin, where the protocol has it so."""
        if self.protocol is None:
            return result
        logits = np.array(result.logits)
        for row, prompt in zip(logits, batch, strict=True):
            if self.protocol.min_new_tokens(prompt.sample.task):
                stops = [text.continue_with(self.tokenizer, stop)[-1] for stop in prompt.sample.stop]
                row[[*self._ends(), *stops]] = -1e30
        return dataclasses.replace(result, logits=jnp.asarray(logits))

    def _likelihoods(self, cache: KVCache, batch: Sequence[Encoded]) -> list[dict[str, Any]]:
        """Each row's text goes on after its cache; the first token of it has no logits and is not counted."""
        texts = [self._rest(prompt.sample) for prompt in batch]
        found, _ = next_token_scores(self.model, *pad_batch(texts), cache=cache)
        sums = np.asarray(found).sum(axis=1)
        counts = [len(words) - 1 for words in texts]
        return [
            {"prediction": "", "finish": "stop", "nll": -float(total) / count, "new_tokens": 0}
            for total, count in zip(sums, counts, strict=True)
        ]

    def _costs(self, n: int, kept: int) -> dict[str, float]:
        c = self.model.config
        costs = {"kv_bytes": kept / full_cache_bytes(c, n, self.model.dtype.itemsize)}
        if not isinstance(self.method, Adaptive):  # each prompt chooses its layer
            costs["prefill_flops"] = prefill_flops(c, self.method, n) / prefill_flops(c, FullKV(), n)
        return costs


@dataclass(frozen=True)
class OnePass:
    """Engines that differ in their methods alone, which let every token through every layer: one prefill serves all.

    Its seconds are nobody's: their answers have no ttft_s.
    """

    engines: tuple[ModelEngine, ...]

    def encode(self, sample: Sample) -> Encoded:
        """The sample's prompt, as `ModelEngine.encode`."""
        return self.engines[0].encode(sample)

    def answer_all(self, batch: Sequence[Encoded]) -> list[list[dict[str, Any]]]:
        """Each engine's answers; raises `MemoryError` if the caches of all do not fit on the device."""
        forget_programs_if_many()
        one, before, asked = self.engines[0], _compilations(), len(batch)
        batch = one._filled(batch)
        new = max(prompt.sample.max_new_tokens for prompt in batch)
        tokens, start, ends = one._batched(batch)
        with _memory_errors():
            read = prefill_all(
                one.model, tokens, start, methods=[engine.method for engine in self.engines], max_new_tokens=new,
                window_end=ends, kernels=one.kernels, kv_dtype=one.kv_dtype,
            )  # fmt: skip
            answers = []
            for engine in self.engines:
                result = read.pop(0)  # and forgotten once it has answered
                answers.append(engine._go_on(result, batch, new, before, None)[:asked])
                before = _compilations()
            return answers


@contextmanager
def _memory_errors() -> Iterator[None]:
    """What the device says of its memory, as `MemoryError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise


@cache
def _counter() -> list[str]:
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: events.append(event) if event == COMPILED else None
    )
    return events


def _compilations() -> int:
    return len(_counter())
