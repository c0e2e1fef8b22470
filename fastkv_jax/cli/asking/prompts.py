"""Where prompts come from: a flag, a file, stdin, or JSON lines. Everything is checked before a model is looked for."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkv_jax.cli.flags.common import add_template_flags
from fastkv_jax.errors import InputError
from fastkv_jax.json_lines import values


@dataclass(frozen=True)
class Request:
    """One question to answer. `system` and `prefill` (the beginning of the answer) are None where there is none."""

    id: Any
    prompt: str
    system: str | None = None
    prefill: str | None = None


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name prompts."""
    group = parser.add_argument_group("prompt (stdin if none is given, or a lone -)")
    parser.set_defaults(dash=None)  # a lone "-", which says what piping does anyway
    group.add_argument(
        "--prompt", metavar="TEXT", help="the question; with --prompt-file it follows the file, after a newline"
    )
    group.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text file; - is stdin")
    group.add_argument(
        "--input", metavar="FILE", help="many prompts: JSON lines with prompt and optional id, system, prefill"
    )
    group.add_argument(
        "--output",
        metavar="FILE",
        help="JSON lines for --input: id, text, finish_reason, token counts, timings, or error (default: stdout)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    group.add_argument("--system", metavar="TEXT", help="system message of the chat")
    group.add_argument("--prefill", metavar="TEXT", help="beginning of the answer, put into the model's mouth")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="insist on the chat template (default: used if there is one)")
    mode.add_argument("--raw", action="store_true", help="no chat template: the model continues the prompt")
    group.add_argument(
        "--split-special-tokens", action="store_true", help="treat texts such as <|im_end|> in the prompt as plain text"
    )
    add_template_flags(group)


def read_requests(options: argparse.Namespace) -> list[Request]:
    """The prompts the flags name, or `InputError`."""
    if options.input is None:
        if options.output is not None:
            raise InputError("--output needs --input; a single answer goes to stdout")
        return [_single(options)]
    for flag in ("prompt", "prompt_file", "system", "prefill", "dash"):
        if getattr(options, flag) is not None:
            name = "-" if flag == "dash" else f"--{flag.replace('_', '-')}"
            raise InputError(f"{name} and --input exclude each other; each line of --input brings its own")
    requests = _json_lines(options.input)
    if options.raw and any(request.system or request.prefill for request in requests):
        raise InputError("--raw has no place for system or prefill")
    return requests


def _single(options: argparse.Namespace) -> Request:
    if options.raw and (options.system or options.prefill):
        raise InputError("--raw has no place for --system or --prefill")
    for flag in ("system", "prefill"):
        _check_text(getattr(options, flag) or "", f"--{flag}")
    for stop in options.stop:
        _check_text(stop, "--stop")
    parts = []
    if options.prompt_file is not None:
        parts.append(read_text(options.prompt_file))
    if options.prompt is not None:
        parts.append(read_text("-") if options.prompt == "-" else _check_text(options.prompt, "--prompt"))
    if not parts:
        if sys.stdin is None or (options.dash is None and sys.stdin.isatty()):
            raise InputError("no prompt: give --prompt, --prompt-file, --input or pipe a text into stdin")
        parts.append(read_text("-"))
    elif options.dash is not None:
        raise InputError("- and --prompt or --prompt-file exclude each other")
    prompt = "\n".join(parts)
    if not prompt.strip():
        raise InputError("prompt is empty")
    return Request(None, prompt, options.system or None, options.prefill or None)


def read_text(name: str) -> str:
    """A UTF-8 text, "-" for stdin, without its byte-order mark; raises `InputError`."""
    if name == "-":
        data, label = sys.stdin.buffer.read(), "stdin"
    else:
        if Path(name).is_dir():
            raise InputError(f"{name} is a folder, not a text file")
        try:
            data, label = Path(name).read_bytes(), name
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{label} is not UTF-8 (byte 0x{data[error.start]:02x} at {error.start})") from error
    return _check_text(text.removeprefix("\ufeff"), label)


def _check_text(text: str, label: str) -> str:
    if "\0" in text:
        raise InputError(f"{label} is not text (NUL byte at {text.index(chr(0))})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a shell argument that was no UTF-8
        raise InputError(f"{label} is not UTF-8 (at character {error.start})") from error
    return text


def _json_lines(name: str) -> list[Request]:
    try:
        requests = [_request(row, number, f"{name} line {number}") for number, row in values(read_text(name))]
    except json.JSONDecodeError as error:
        raise InputError(f"{name} line {error.lineno} is not JSON: {error}") from error
    if not requests:
        raise InputError(f"{name} holds no prompts")
    return requests


def _request(row: Any, number: int, where: str) -> Request:
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object with a prompt, found {type(row).__name__}")
    text: Callable[[str], str | None] = lambda field: _text_field(row, field, where)  # noqa: E731
    prompt = text("prompt")
    if prompt is None or not prompt.strip():
        raise InputError(f"{where}: prompt is empty" if "prompt" in row else f"{where}: field 'prompt' is missing")
    identity = row.get("id")
    if isinstance(identity, str):
        _check_text(identity, f"{where}: id")
    elif isinstance(identity, bool) or not isinstance(identity, int | float | None) or not _finite(identity):
        raise InputError(f"{where}: id must be a string or a number, found {identity!r}")
    return Request(number if identity is None else identity, prompt, text("system") or None, text("prefill") or None)


def _finite(identity: int | float | None) -> bool:
    return not isinstance(identity, float) or math.isfinite(identity)


def _text_field(row: dict[str, Any], field: str, where: str) -> str | None:
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {field} must be a string, found {value!r}")
    return value if value is None else _check_text(value, f"{where}: {field}")
