"""Answer prompts with a Llama-family model, its long prompts compressed by FastKV.

Only the answer goes to stdout; everything else goes to stderr.

  generate.py --prompt "Why is the sky blue?"
  generate.py --prompt-file book.txt --prompt "Who is the narrator?" --max-new-tokens 64
  generate.py --input questions.jsonl --output answers.jsonl --method full
"""

import argparse
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv_jax.cli.asking import checks, prompts
from fastkv_jax.cli.flags import common, settings
from fastkv_jax.errors import InputError, ModelWarning
from fastkv_jax.methods import presets

if TYPE_CHECKING:
    from fastkv_jax import checkpoint
    from fastkv_jax.cli.asking.answering import Encoded, Engine
    from fastkv_jax.cli.asking.report import Reporter
    from fastkv_jax.cli.asking.saved import Saved
    from fastkv_jax.methods.base import Method
    from fastkv_jax.model.config import LlamaConfig

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
    checks.check(options)
    requests = prompts.read_requests(options)
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    return _generate(options, requests, platform)


class Asked(NamedTuple):
    """What flags and files come to, before any weights load."""

    found: "checkpoint.Resolved"
    config: "LlamaConfig"
    tokenizer: Any
    preset: presets.Preset
    method: "Method"
    stops: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    saved: "Saved | None"  # a document read before
    chat: bool
    jobs: "list[tuple[prompts.Request, Encoded | InputError]]"


def _generate(options: argparse.Namespace, requests: list[prompts.Request], platform: str) -> int:
    from fastkv_jax.cli.asking import output
    from fastkv_jax.cli.asking.report import Reporter

    say = Reporter(quiet=options.quiet)
    dtype = common.dtype_for(options, platform)
    asked = _understood(options, requests)
    say.header(platform, dtype)  # nothing is said before all checks are passed: an error is one line
    say.attention(platform, dtype, asked.config.head_dim)
    if asked.saved is None:
        say.line("preset", asked.preset.describe(options.method, asked.method))
        say.line("prompt", "through the chat template" if asked.chat else "raw, without a chat template")
    else:
        say.line("cache", f"{asked.saved.path}: {asked.saved.tokens:,} tokens read by {asked.saved.method}")
    for request, job in asked.jobs:
        say.job(request.id, job, options.truncate)
    if options.dry_run:
        fitting = [job for _, job in asked.jobs if not isinstance(job, InputError)]
        say.plan(asked.config, asked.method, fitting, dtype, options.max_new_tokens)
        return common.OK
    engine = _engine(options, asked, dtype, say)
    if options.input is not None:
        return output.many(options, engine, asked.jobs, say)
    effective = {
        "preset": asked.preset.name,
        "method": options.method if asked.saved is None else asked.saved.method,
        **presets.settings(asked.method),
        "dtype": dtype,
        "kv_dtype": options.kv_dtype,
        "platform": platform,
    }
    job = asked.jobs[0][1]
    assert not isinstance(job, InputError)  # raised where there is but one
    return output.one(options, engine, job, say, effective)


def _understood(options: argparse.Namespace, requests: list[prompts.Request]) -> Asked:
    """All checks that files are needed for."""
    from fastkv_jax import checkpoint, text
    from fastkv_jax.cli.asking.encoding import encode_all, use_chat
    from fastkv_jax.cli.asking.saved import Saved
    from fastkv_jax.decoding.answers import split_stops
    from fastkv_jax.methods import FullKV
    from fastkv_jax.prefilling.doors import check_in_chunks

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
        told = f"{found.path} names no end token, so that answers run to their limit; give --stop"
        warnings.warn(told, ModelWarning, stacklevel=1)
    if saved is not None:
        saved.check_chat(chat=options.chat, raw=options.raw)
        method = FullKV()  # of a question everything stays
    chat = use_chat(options, text.has_chat_template(tokenizer), requests)
    rendering.check(tokenizer)
    jobs = list(encode_all(options, requests, tokenizer, config, preset, rendering if chat else None, saved))
    return Asked(found, config, tokenizer, preset, method, stops, stop_tokens, saved, chat, jobs)


def _engine(options: argparse.Namespace, asked: Asked, dtype: str, say: "Reporter") -> "Engine":
    """The model, loaded, and how it reads and answers."""
    import jax

    from fastkv_jax import checkpoint
    from fastkv_jax.cli.asking.answering import Engine
    from fastkv_jax.decoding.sampling import Greedy, Sample
    from fastkv_jax.prefilling.doors import PrefillOptions

    with say.timed("loading", f"{asked.found.name}") as note:
        model = checkpoint.load_model(asked.found, dtype, check_weights=options.check_weights, progress=say.interactive)
        jax.block_until_ready(model)
        note(f"{sum(a.nbytes for a in jax.tree.leaves(model)) / 1e9:.2f} GB")
    greedy = options.temperature == 0
    sampler = Greedy() if greedy else Sample(options.temperature, options.top_p, options.top_k, options.min_p)
    reading: PrefillOptions = {
        "method": asked.method,
        "max_new_tokens": options.max_new_tokens,
        "cache": None if asked.saved is None else asked.saved.load(model, asked.tokenizer),
        "kernels": options.kernels,
        "kv_dtype": KV_DTYPES.get(options.kv_dtype),
        "prefill_chunk": options.prefill_chunk,
    }
    return Engine(
        model, asked.tokenizer, reading, sampler, options.seed, stops=asked.stops, stop_tokens=asked.stop_tokens
    )
