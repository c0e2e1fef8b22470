"""Answers on their way out: one as a stream, many as JSON lines."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from fastkv_jax.cli.asking.answering import Encoded, Engine
from fastkv_jax.cli.asking.prompts import Request
from fastkv_jax.cli.asking.report import AnswerWriter, Reporter, as_json
from fastkv_jax.cli.asking.saved import parts, save
from fastkv_jax.cli.flags import common
from fastkv_jax.errors import InputError
from fastkv_jax.files import replacing
from fastkv_jax.methods import FullKV
from fastkv_jax.methods.plan import layers_run


def one(options: argparse.Namespace, engine: Engine, job: Encoded, say: Reporter, effective: dict[str, Any]) -> int:
    """One answer, streamed to stdout."""
    from fastkv_jax.explanation.explanation import explain

    def picture(result: Any, tokens: Any, start: Any) -> None:
        if options.explain is not None and engine.reading.get("cache") is None:  # of what is read first
            explanation = explain(result, tokens, engine.tokenizer, start=start)
            explanation.save(options.explain)
            for line in explanation.summary().splitlines():
                say.line("explain", line)

    if options.save_cache is not None:
        engine, job = _read_and_save(options, engine, job, say, picture)
        if options.max_new_tokens == 0:
            return common.OK
    out = AnswerWriter(sys.stdout, options.stream_interval, strip_controls=options.no_color)
    show = (lambda piece: None) if options.json else out.write
    with _terminable(), say.progress(layers_run(engine.method, engine.model.config.num_layers), job) as progress:
        answer = engine.answer(job, show, say.compiled, progress, picture)
    if options.json:
        out.write(json.dumps(as_json(answer, effective, options.warnings), ensure_ascii=False, allow_nan=False))
    out.finish()
    say.stats(answer, engine.method, options.method)
    return common.INTERRUPTED if answer.finish_reason == "interrupted" else common.OK


def _read_and_save(
    options: argparse.Namespace, engine: Engine, job: Encoded, say: Reporter, picture: Callable[..., None]
) -> tuple[Engine, Encoded]:
    """Read the prompt's words and keep them in a file; what is left to do: answer the template's tail after them."""
    words, rest, tail = parts(engine.tokenizer, job)
    with say.timed("reading", f"{len(words):,} tok") as note:
        result, tokens, start = engine.read(words)
        picture(result, tokens, start)
        save(options.save_cache, result.cache, engine.model, engine.tokenizer, job, engine.method)
        note(f"{options.save_cache}: {Path(options.save_cache).stat().st_size / 1e6:.1f} MB")
    if not tail and options.max_new_tokens:
        raise InputError("--save-cache answers only through a chat template; give -n 0, and ask with --load-cache")
    reading = {**engine.reading, "cache": result.cache, "method": FullKV()}
    return replace(engine, reading=reading), Encoded([*rest, *tail], 0, 0)


def many(
    options: argparse.Namespace,
    engine: Engine,
    jobs: Sequence[tuple[Request, Encoded | InputError]],
    say: Reporter,
) -> int:
    """Answers as JSON lines, in the order of the requests; a failed one does not stop the rest."""
    failed = 0
    with _terminable(), _destination(options) as out, say.rows(len(jobs)) as advance:
        for place, (request, job) in enumerate(jobs):
            if isinstance(job, InputError):
                row: dict[str, Any] = {"id": request.id, "error": str(job)}
            else:
                row = {"id": request.id, **_answer_or_error(engine, job, place)}
            failed += "error" in row
            interrupted = row.get("finish_reason") == "interrupted"
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            out.flush()
            if interrupted:
                raise KeyboardInterrupt
            advance()
    if failed:
        print(f"error: {failed} of {len(jobs)} prompts failed; see their error fields", file=sys.stderr)
    return common.FAILED if failed else common.OK


def _answer_or_error(engine: Engine, job: Encoded, place: int) -> dict[str, Any]:
    try:
        answer = engine.answer(job, row=place)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": "oom"}
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": len(answer.token_ids),
        "timings": answer.timings(),
    }


@contextmanager
def _destination(options: argparse.Namespace) -> Iterator[TextIO]:
    """stdout, or a new file; an existing one is replaced only when all answers are there."""
    if options.output is None:
        yield sys.stdout
        return
    target = Path(options.output)
    if not target.exists():
        with target.open("w", encoding="utf-8") as out:
            yield out
        return
    with replacing(target) as scratch:
        with scratch.open("w", encoding="utf-8") as out:
            yield out


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run like an exception, so that what is done is written."""

    def stop(*_: object) -> None:
        raise common.Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
