"""A model of ours for lm-evaluation-harness: `python -m fastkv_jax lm_eval --model fastkv_jax --tasks ...`

Importing this module registers it. What likelihood means under compression: the context is prefilled with the method,
and the continuation is scored from the compressed cache.

The harness hands over the requests of one kind at a time, the first kind before the others are seen. So what a task's
file asks of its answers is refused before any of its own kind runs, but after the likelihoods of a task before it; the
command's --gen_kwargs are refused before all of them.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from fastkv_jax import checkpoint, text
from fastkv_jax.buckets import bucket_for, pad_batch
from fastkv_jax.chat_template import Rendering, parse_arguments, parse_date, render
from fastkv_jax.checkpoint import Resolved
from fastkv_jax.decoding.answers import split_stops
from fastkv_jax.decoding.sampling import Sampler
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals import gen_kwargs
from fastkv_jax.evals.engine import ModelEngine
from fastkv_jax.evals.gen_kwargs import Decoding
from fastkv_jax.evals.sample import Encoded, Sample
from fastkv_jax.methods import presets
from fastkv_jax.prefilling import doors
from fastkv_jax.prefilling.likelihood import next_token_scores

NO_ROLLING = (
    "the likelihood of a whole text has no prompt to compress; use tasks with a context, or "
    "evaluate.py --suite perplexity"
)


def _rendering(thinks: bool | None, given: str | dict[str, Any] | None, date: str | None) -> Rendering:
    arguments = dict(given) if isinstance(given, dict) else parse_arguments(given or "{}")
    arguments |= {} if thinks is None else {"enable_thinking": thinks}
    return Rendering(datetime.now() if date is None else parse_date(str(date)), arguments)


@register_model("fastkv_jax")
class FastKVModel(LM):
    """`--model_args model=...,method=fastkv,preset=...,dtype=auto,max_length=8192,tsp_rate=0.2,...`

    Any setting of the method can be given. Prompts that are too long are cut in the middle. `enable_thinking` and
    `chat_template_args` (a JSON object) go to the chat template, `date` is the day that it is told.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        method: str = "fastkv",
        preset: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,  # the harness passes cuda:0 to whoever runs; JAX has chosen
        kv_dtype: str | None = None,
        tokenizer: str | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: str | dict[str, Any] | None = None,
        date: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        del device, max_batch_size
        found = checkpoint.resolve(model, tokenizer=tokenizer)
        config = checkpoint.inspect(found)
        chosen = presets.load(preset) if preset else presets.for_model(found.name)
        built = presets.build(method, chosen, settings, config.num_layers)
        limit = config.max_position_embeddings if max_length is None else int(max_length)
        if not 1 <= limit <= config.max_position_embeddings:
            raise FastKVConfigError(f"max_length must be in 1 ... {config.max_position_embeddings:,}, got {limit}")
        on_cpu = jax.default_backend() == "cpu"
        dtype = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype
        self._found: Resolved = found
        self._tokenizer = text.load_tokenizer(found)
        self._rows = int(batch_size) if str(batch_size).isdecimal() else 1
        self._new_tokens = int(max_gen_toks)
        self._at_question = chosen.window_end == "question"
        self._template_end = ""
        text.check_vocabulary(self._tokenizer, config)
        rendering = _rendering(enable_thinking, chat_template_args, date)
        rendering.check(self._tokenizer)
        self._engine = ModelEngine(
            checkpoint.load_model(found, dtype), self._tokenizer, built, limit, self._at_question, kv_dtype=kv_dtype,
            rendering=rendering,
        )  # fmt: skip
        self._engines: dict[tuple[Sampler, int], ModelEngine] = {}

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return self._found.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the harness's records."""
        return self._tokenizer.get_chat_template() if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered chat. What the template writes behind the last message is remembered: there the window ends."""
        rendered = render(
            self._tokenizer, chat_history, self._engine.rendering, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        last = chat_history[-1]["content"].strip()
        if add_generation_prompt and last in rendered:
            self._template_end = rendered[rendered.rindex(last) + len(last) :]
        return rendered

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in the requests' order; the longest are asked first, so that memory runs out at once or never."""
        asked = [gen_kwargs.read(request.args[1], self._new_tokens) for request in requests]
        prompts = [
            self._prompt(i, request.args[0], one) for i, (request, one) in enumerate(zip(requests, asked, strict=True))
        ]
        said: dict[int, str] = {}
        with tqdm(total=len(prompts), disable=disable_tqdm, desc="fastkv_jax") as bar:
            for batch in self._batches(prompts, asked):
                engine = self._engine_for(asked[int(batch[0].sample.id)])
                for prompt, answer in zip(batch, engine.answer(batch), strict=True):
                    i = int(prompt.sample.id)
                    said[i] = answer["prediction"]
                    self.cache_hook.add_partial("generate_until", requests[i].args, said[i])
                bar.update(len(batch))
        return [said[i] for i in range(len(prompts))]

    def _batches(self, prompts: list[Encoded], asked: list[Decoding]) -> Iterator[list[Encoded]]:
        """Rows of a batch are as long and decoded in the same way."""

        def shape(prompt: Encoded) -> tuple[int, int, str]:
            how = asked[int(prompt.sample.id)]
            return -bucket_for(len(prompt.tokens)), how.new_tokens, f"{how.sampler} {how.seed}"

        for _, same in groupby(sorted(prompts, key=shape), key=shape):
            mine = list(same)
            yield from (mine[at : at + self._rows] for at in range(0, len(mine), self._rows))

    def _engine_for(self, how: Decoding) -> ModelEngine:
        key = how.sampler, how.seed
        if key not in self._engines:
            self._engines[key] = dataclasses.replace(self._engine, sampler=how.sampler, seed=how.seed)
        return self._engines[key]

    def _prompt(self, i: int, context: str, how: Decoding) -> Encoded:
        split_stops(self._tokenizer, how.stops)  # or it is refused, before anything runs
        sample = Sample("lm_eval", str(i), context, "", (), how.new_tokens, chat=False, stop=how.stops)
        encoded = self._engine.encode(sample)
        if not encoded.tokens:
            return encoded._replace(tokens=[self._first_token()])
        return encoded._replace(window_end=min(self._tail(context), len(encoded.tokens) - 1))

    def _tail(self, context: str) -> int:
        """Tokens of the chat template behind the question, with the answer's given beginning."""
        if not (self._at_question and self._template_end and self._template_end in context):
            return 0
        return len(text.continue_with(self._tokenizer, context[context.rindex(self._template_end) :]))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one); equal contexts are read once."""
        pairs = [(*self._pair(*request.args), i) for i, request in enumerate(requests)]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="fastkv_jax") as bar:
            for context, same in groupby(sorted(pairs, key=lambda pair: (-len(pair[0]), pair[0])), key=lambda p: p[0]):
                read = self._read(context)
                for _, continuation, i in same:
                    found[i] = self._likelihood(read, continuation)
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
                    bar.update()
        return [found[i] for i in range(len(pairs))]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; a space between them belongs to the continuation, as tokenizers have it.

        So does a token in which both meet: the context is what the tokens of the whole have in common with its own.
        """
        whole = text.encode_raw(self._tokenizer, context + continuation).token_ids
        before = text.encode_raw(self._tokenizer, context.rstrip()).token_ids
        if not continuation:
            before, whole = whole, whole
        met = len(os.path.commonprefix([before, whole]))
        before, after = whole[:met], whole[met:]
        before = before or [self._first_token()]
        room = self._engine.max_tokens - len(after)
        if room < 1:
            raise FastKVConfigError(f"a continuation of {len(after):,} tokens leaves no room for its context")
        half = room // 2
        return before if len(before) <= room else [*before[: room - half], *before[len(before) - half :]], after

    def _first_token(self) -> int:
        """What stands where the context is empty: the token that begins a text, or else one that ends it."""
        known = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, *self._engine.model.config.stop_tokens)
        return next((token for token in known if token is not None), 0)

    def _read(self, context: list[int]) -> doors.Prefill:
        engine = self._engine
        return doors.prefill(
            engine.model, *pad_batch([context]), method=engine.method, max_new_tokens=0, kv_dtype=engine.kv_dtype
        )

    def _likelihood(self, read: doors.Prefill, continuation: list[int]) -> tuple[float, bool]:
        """The first token is judged by the prompt's own logits, the others by what follows the cache.

        That nothing follows is certain.
        """
        if not continuation:
            return 0.0, True
        logits = np.asarray(read.logits[0], np.float64)
        first = logits[continuation[0]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        greedy = int(logits.argmax()) == continuation[0]
        if len(continuation) == 1:
            return float(first), greedy
        scores, best = next_token_scores(self._engine.model, *pad_batch([continuation]), cache=read.cache)
        rest, chosen = np.asarray(scores)[0], np.asarray(best)[0, 1 - len(continuation) :]
        return float(first + rest.sum()), greedy and chosen.tolist() == continuation[1:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not defined here."""
        raise FastKVConfigError(NO_ROLLING)
