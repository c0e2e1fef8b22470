"""What generate.py's flags allow, checked before anything loads."""

import argparse
import math
from pathlib import Path

from fastkv_jax.cli.flags import settings
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.files import check_target
from fastkv_jax.seeds import check_seed


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
