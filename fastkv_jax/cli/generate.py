"""Answer prompts with a Llama-family model, its long prompts compressed by FastKV.

Only the answer goes to stdout; everything else goes to stderr.

  generate.py --prompt "Why is the sky blue?"
  generate.py --prompt-file book.txt --prompt "Who is the narrator?" --max-new-tokens 64
  generate.py --input questions.jsonl --output answers.jsonl --method full
"""

import argparse
import json
import math
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from fastkv_jax.cli.asking import prompts
from fastkv_jax.cli.flags import common, settings
from fastkv_jax.errors import FastKVConfigError, InputError, ModelWarning
from fastkv_jax.files import check_target, replacing
from fastkv_jax.methods import FullKV, presets
from fastkv_jax.methods.plan import layers_run
from fastkv_jax.seeds import check_seed

KV_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


def parser() -> common.Parser:
    """All flags, with their ranges."""
    parser = common.Parser(prog="generate.py", description=__doc__)
    group = common.add_model_flags(parser)
    group.add_argument(
        "--max-seq-len", type=int, metavar="N", help="prompt and answer together, >= 2 (default: the model's own limit)"
    )
    group.add_argument("--check-weights", action="store_true", help="look for NaN and infinity while loading")
    prompts.add_prompt_flags(parser)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-n", "--max-new-tokens", "--max-tokens", type=int, default=128, metavar="N", help=">= 1 (default: 128)"
    )
    group.add_argument(
        "--temperature", "--temp", type=float, default=0.0, metavar="T", help=">= 0; 0 is greedy (default: 0)"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="in (0, 1]; 1 = off (default)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help=">= 0; 0 = off (default)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="in [0, 1]; 0 = off (default)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="0 to 2**32 - 1 (default: 0)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; repeatable"
    )
    group.add_argument(
        "--truncate", choices=("left", "right", "middle"), help="cut a prompt that is too long (default: an error)"
    )
    settings.add_method_flags(parser)
    parser.add_argument(
        "--kv-dtype", choices=tuple(KV_DTYPES), help="keep the prompt's entries in 8 bits (default: the model's dtype)"
    )
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="read prompts N tokens at a time and evict in between, >= 1: "
        "less memory (default: all at once)"
    )  # fmt: skip
    parser.add_argument(
        "--kernels", choices=("reference", "tpu", "gpu"), help="reference = plain jax.numpy (default: the platform's)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of text")
    group.add_argument(
        "--explain", metavar="FILE", help="a picture of what was kept of the prompt: a page (.html) or an image (.png)"
    )
    group.add_argument(
        "--save-cache",
        metavar="FILE",
        help="keep what was read of the prompt, before the answer, for --load-cache; -n 0 then answers nothing",
    )
    group.add_argument(
        "--load-cache", metavar="FILE", help="go on from a saved prompt: --prompt or --input bring only the questions"
    )
    group.add_argument(
        "--stream-interval", type=int, default=1, metavar="N", help="print after every N pieces, >= 1 (default: 1)"
    )
    group.add_argument("--no-color", action="store_true", help="strip control characters from the answer")
    group.add_argument(
        "--dry-run", action="store_true", help="print the plan and the memory it needs, without loading weights"
    )
    common.add_run_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse(argv)
    return common.run(_run, options)


def _run(options: argparse.Namespace) -> int:
    check(options)
    requests = prompts.read_requests(options)
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    return _generate(options, requests, platform)


def check(options: argparse.Namespace) -> None:
    """Ranges of all flags that need no model. Raises `FastKVConfigError` naming flag, value and range."""
    least = 1 if options.save_cache is None else 0
    rules: list[tuple[str, bool, str]] = [
        ("max_new_tokens", options.max_new_tokens >= least, f">= {least}"),
        ("prefill_chunk", options.prefill_chunk is None or options.prefill_chunk >= 1, ">= 1"),
        ("temperature", math.isfinite(options.temperature) and options.temperature >= 0, "finite and >= 0"),
        ("top_p", 0 < options.top_p <= 1, "in (0, 1]"),
        ("top_k", options.top_k >= 0, ">= 0 (0 = off)"),
        ("min_p", 0 <= options.min_p <= 1, "in [0, 1]"),
        ("max_seq_len", options.max_seq_len is None or options.max_seq_len >= 2, ">= 2"),
        ("stream_interval", options.stream_interval >= 1, ">= 1"),
    ]
    for name, fine, allowed in rules:
        if not fine:
            raise FastKVConfigError(f"{name} must be {allowed}, got {getattr(options, name)}")
    check_seed(options.seed)
    if "" in options.stop:
        raise FastKVConfigError("a stop string must not be empty")
    if options.input is not None and options.json:
        raise FastKVConfigError("--json and --input exclude each other; --input always writes JSON lines")
    if options.output is not None:
        _check_output(Path(options.output), options.overwrite)
    if options.explain is not None:
        from fastkv_jax.explanation.explanation import check_path

        check_path(options.explain)
    for flag in ("save_cache", "explain"):
        if getattr(options, flag) is not None and options.input is not None:
            raise FastKVConfigError(f"--{flag.replace('_', '-')} is for one prompt; --input brings many")
    if options.save_cache is not None:
        check_target(options.save_cache)
        if options.prefill is not None or options.load_cache is not None:
            raise FastKVConfigError("--save-cache has no place for --prefill or --load-cache")
    if options.load_cache is not None:
        _check_beside_a_cache(options)
    settings.check(options)


def _check_beside_a_cache(options: argparse.Namespace) -> None:
    """What belongs to the reading of a document is in its file; nothing given beside it is dropped in silence."""
    flags = ("preset", "chat_template_args", "date", "prefill_chunk", "truncate")
    given = [name for name in flags if getattr(options, name) not in (None, False)]
    given += [*settings.given(options), *(["method"] if options.method != "fastkv" else [])]
    if given:
        flag = given[0].replace("_", "-")
        raise FastKVConfigError(f"--load-cache brings its document's own settings; --{flag} has no place beside it")


def _check_output(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"--output {path} is a folder")
    if path.exists() and not overwrite:
        raise InputError(f"--output {path} exists; give --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.absolute().parent}")


def _generate(options: argparse.Namespace, requests: list[prompts.Request], platform: str) -> int:
    import jax

    from fastkv_jax import checkpoint, text
    from fastkv_jax.cli.asking.answering import Engine
    from fastkv_jax.cli.asking.report import Reporter
    from fastkv_jax.cli.asking.saved import Saved
    from fastkv_jax.decoding.answers import split_stops
    from fastkv_jax.decoding.sampling import Greedy, Sample
    from fastkv_jax.prefilling.doors import PrefillOptions, check_in_chunks

    say = Reporter(quiet=options.quiet)
    dtype = common.dtype_for(options, platform)
    rendering = common.rendering(options)
    found = checkpoint.resolve(options.model, tokenizer=options.tokenizer, progress=not options.quiet)
    config = checkpoint.inspect(found)
    saved = None if options.load_cache is None else Saved.read(options.load_cache)
    preset, method = settings.method(options, found.name, config.num_layers)
    if options.prefill_chunk is not None:
        check_in_chunks(method, config.num_layers)
    tokenizer = text.load_tokenizer(found)
    text.check_vocabulary(tokenizer, config)
    stops, stop_tokens = split_stops(tokenizer, options.stop)
    if not (config.stop_tokens or options.stop):
        warnings.warn(
            f"{found.path} names no end token, so that answers run to their limit; give --stop",
            ModelWarning,
            stacklevel=1,
        )
    if saved is not None and (options.raw if saved.tail else options.chat):
        how = "with" if saved.tail else "without"
        raise InputError(f"{saved.path} was read {how} a chat template, and its questions are too; leave the flag out")
    chat = _use_chat(options, text.has_chat_template(tokenizer), requests)
    rendering.check(tokenizer)
    jobs = list(_encode_all(options, requests, tokenizer, config, preset, rendering if chat else None, saved))
    say.header(platform, dtype)  # nothing is said before all checks are passed: an error is one line
    if saved is None:
        say.line("preset", preset.describe(options.method, method))
        say.line("prompt", "through the chat template" if chat else "raw, without a chat template")
    else:
        method = FullKV()  # of a question everything stays
        say.line("cache", f"{saved.path}: {saved.tokens:,} tokens read by {saved.method}")
    for request, job in jobs:
        say.job(request.id, job, options.truncate)
    if options.dry_run:
        say.plan(
            config, method, [job for _, job in jobs if not isinstance(job, InputError)], dtype, options.max_new_tokens
        )
        return common.OK

    with say.timed("loading", f"{found.name}") as note:
        model = checkpoint.load_model(found, dtype, check_weights=options.check_weights, progress=say.interactive)
        jax.block_until_ready(model)
        note(f"{sum(a.nbytes for a in jax.tree.leaves(model)) / 1e9:.2f} GB")
    greedy = options.temperature == 0
    sampler = Greedy() if greedy else Sample(options.temperature, options.top_p, options.top_k, options.min_p)
    reading: PrefillOptions = {
        "method": method,
        "max_new_tokens": options.max_new_tokens,
        "cache": None if saved is None else saved.load(model, tokenizer),
        "kernels": options.kernels,
        "kv_dtype": KV_DTYPES.get(options.kv_dtype),
        "prefill_chunk": options.prefill_chunk,
    }
    engine = Engine(model, tokenizer, reading, sampler, options.seed, stops=stops, stop_tokens=stop_tokens)
    effective = {
        "preset": preset.name,
        "method": options.method if saved is None else saved.method,
        **presets.settings(method),
        "dtype": dtype,
        "kv_dtype": options.kv_dtype,
        "platform": platform,
    }
    if options.input is None:
        return _one(options, engine, jobs[0][1], say, effective)
    return _many(options, engine, jobs, say)


def _use_chat(options: argparse.Namespace, has_template: bool, requests: list[prompts.Request]) -> bool:
    if options.chat and not has_template:
        raise InputError("this tokenizer has no chat template; use --raw")
    chat = has_template and not options.raw
    if not chat and any(request.system or request.prefill for request in requests):
        raise InputError("system and prefill need a chat template, and this tokenizer has none")
    if not chat and (options.chat_template_args or options.date):
        raise InputError("--chat-template-args and --date go to a chat template, and none is used here")
    return chat


def _encode_all(
    options, requests, tokenizer, config, preset, rendering, saved
) -> Iterator[tuple[prompts.Request, Any]]:
    """Every request with its tokens; in a batch, one that does not fit is answered by its error."""
    from fastkv_jax.chat_template import Rendering
    from fastkv_jax.cli.asking.answering import PromptOptions, encode

    limit, name = config.max_position_embeddings, "max_position_embeddings"
    if options.max_seq_len is not None:
        if options.max_seq_len > limit:
            raise FastKVConfigError(
                f"max_seq_len {options.max_seq_len} exceeds the model's max_position_embeddings, {limit}"
            )
        limit, name = options.max_seq_len, "--max-seq-len"
    how = PromptOptions(
        rendering is not None,
        options.max_new_tokens,
        limit,
        name,
        options.truncate,
        options.split_special_tokens,
        preset.window_end == "question",
        rendering or Rendering(),
    )
    for request in requests:
        try:
            if saved is None:
                job = encode(tokenizer, request, config, how)
            else:
                new, split = options.max_new_tokens, options.split_special_tokens
                job = saved.encode(tokenizer, request, config, new, split)
        except InputError as error:
            if options.input is None:
                raise
            yield request, error
            continue
        yield request, job


def _one(options, engine, job, say, effective: dict[str, Any]) -> int:
    """One answer, streamed to stdout."""
    from fastkv_jax.cli.asking import report
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
    out = report.AnswerWriter(sys.stdout, options.stream_interval, strip_controls=options.no_color)
    show = (lambda piece: None) if options.json else out.write
    with _terminable(), say.progress(layers_run(engine.method, engine.model.config.num_layers), job) as progress:
        answer = engine.answer(job, show, say.compiled, progress, picture)
    if options.json:
        out.write(json.dumps(report.as_json(answer, effective, options.warnings), ensure_ascii=False, allow_nan=False))
    out.finish()
    say.stats(answer, engine.method, options.method)
    return common.INTERRUPTED if answer.finish_reason == "interrupted" else common.OK


def _read_and_save(options, engine, job, say, picture) -> tuple[Any, Any]:
    """Read the prompt's words and keep them in a file; what is left to do: answer the template's tail after them."""
    from fastkv_jax.cli.asking.answering import Encoded
    from fastkv_jax.cli.asking.saved import parts, save

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


def _many(options, engine, jobs, say) -> int:
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


def _answer_or_error(engine, job, place: int) -> dict[str, Any]:
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
