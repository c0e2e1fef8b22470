"""Chat templates: programs that come with a model and write its conversations. Rendered in transformers' sandbox."""

import inspect
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastkv_jax.errors import FastKVConfigError, InputError, ModelWarning

MAX_TEMPLATE_CHARACTERS = 1_000_000
"""What a chat template may add to the messages. Templates come with the model; a loop in one can render gigabytes."""
# transformers hands a template plain data alone, and its own clock. So the clock is written in front of the template:
# what each code of strftime means at the moment given. An expression ends it, after which Jinja keeps a line's end.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- for part in format.split('%%') -%}{%- set told = namespace(text=part) -%}"
    "{%- for code in moment_codes -%}{%- set told.text = told.text.replace(code[0], code[1]) -%}{%- endfor -%}"
    "{{ told.text if loop.first else '%' + told.text }}{%- endfor -%}{%- endmacro -%}{{ '' }}"
)
_CODE = re.compile(r"%[-_0^#]?\d{0,2}[EO]?[A-Za-z]")
_CODES = [f"%{dash}{letter}" for dash in ("", "-") for letter in "aAbBcdDeFGHIjmMpRSTuUVwWxXyYf"]
_MARK = "a rule that nobody would give: zq7vx"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Rendering:
    """What a template is told beside the messages: the moment (None: now), and arguments of its own."""

    moment: datetime | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def check(self, tokenizer: Any) -> None:
        """Raise `FastKVConfigError` for an argument that is not the template's; warn of one that it never reads."""
        ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"kwargs", "tools", "documents"}
        for name in self.arguments:
            if name in ours | {"messages", "strftime_now", "moment_codes"}:
                raise FastKVConfigError(f"chat template argument {name!r} is set by fastkv_jax; leave it out")
            if name not in str(getattr(tokenizer, "chat_template", None) or ""):
                warnings.warn(f"the chat template never reads {name!r}; it changes nothing", ModelWarning, stacklevel=2)


def parse_arguments(text: str) -> dict[str, Any]:
    """A template's arguments from a JSON object, else `FastKVConfigError`."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise FastKVConfigError(f"chat template arguments must be a JSON object, got {text!r} ({error})") from error
    if not isinstance(found, dict):
        raise FastKVConfigError(f"chat template arguments must be a JSON object, got {text!r}")
    if any(isinstance(value, float) and not math.isfinite(value) for value in found.values()):
        raise FastKVConfigError(f"chat template arguments must be finite, got {text!r}")
    return found


def parse_date(text: str) -> datetime:
    """A day, 2026-11-27, or a moment, 2026-11-27T18:30, else `FastKVConfigError`."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise FastKVConfigError(f"a date is YYYY-MM-DD, with THH:MM if wanted, got {text!r}") from error


def has_chat_template(tokenizer: Any) -> bool:
    """Whether conversations can be rendered."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Messages, rendering: Rendering = Rendering(), **options: Any) -> str:
    """The text of a conversation, BOS included where the template writes one, with the beginning of an answer.

    `options` are `apply_chat_template`'s. Raises `InputError` if the template refuses the messages, fails, leaves a
    system message out, which another one in its place shows, or writes too much.
    """
    rendered = _rendered(tokenizer, messages, rendering, options)
    others = [{**message, "content": _MARK} if message["role"] == "system" else message for message in messages]
    if others != list(messages) and _MARK not in _rendered(tokenizer, others, rendering, options).casefold():
        raise InputError("the model's chat template leaves the system message out; put it into the prompt")
    return rendered


def _rendered(tokenizer: Any, messages: Messages, rendering: Rendering, options: Mapping[str, Any]) -> str:
    options = {"add_generation_prompt": True, **rendering.arguments, **options}
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            moment = rendering.moment or datetime.now()
            written = _CODE.findall(template + json.dumps(dict(rendering.arguments)))
            codes = [(code, moment.strftime(code)) for code in dict.fromkeys([*_CODES, *written])]
            options |= {"chat_template": _CLOCK + template, "moment_codes": codes}
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # a template is a program, and fails in any way that programs do
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the model's chat template failed: {reason[:300]}") from error
    added = len(rendered) - sum(len(message["content"]) for message in messages)
    if added > MAX_TEMPLATE_CHARACTERS:
        raise InputError(
            f"the model's chat template adds {added} characters, more than {MAX_TEMPLATE_CHARACTERS}; use --raw"
        )
    if any("\ud800" <= character <= "\udfff" for character in rendered):
        raise InputError("the model's chat template writes half a surrogate pair, which is no text")
    return rendered
