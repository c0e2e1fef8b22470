"""What a chat template writes behind an answer: a token there ends the model's turn, whatever else the files say."""

import json
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

MOST_PIECES = 100_000  # of a rendered conversation: a loop in a template can render gigabytes
MOST_STEPS = 1_000_000  # of all ranges together: loops inside loops need not write anything to last for hours
_QUESTION = {"role": "user", "content": "A question, by its own words."}
_ANSWER = {"role": "assistant", "content": "An answer, by its own words."}
_NEXT = {"role": "user", "content": "Another question, by its own words."}
_RULES = {"role": "system", "content": "Some rules."}  # some templates want them, others refuse them


def turn_ends(template: str, names: Mapping[str, str], special: Mapping[str, int]) -> tuple[int, ...]:
    """The special token that the template puts right behind an answer, if it puts one there.

    Of a template for one question alone, the token behind the question. `names` are the template's variables
    (`eos_token`, ...), `special` the ids of special tokens by their texts. A template that cannot be rendered says
    nothing.
    """
    talks = False
    for messages in ([_QUESTION, _ANSWER], [_QUESTION, _ANSWER, _NEXT], [_QUESTION]):
        if talks and _ANSWER not in messages:
            break
        words = (_ANSWER if _ANSWER in messages else _QUESTION)["content"]
        for rules in ([], [_RULES]):
            rendered = _render(template, names, [*rules, *messages])
            said = [match.end() for match in re.finditer(re.escape(words), rendered, re.IGNORECASE)]
            talks |= bool(said)
            tail = rendered[said[-1] :].lstrip() if said else ""
            found = [text for text in special if text and tail.startswith(text)]
            if found:
                return (special[max(found, key=len)],)
    return ()


def _ranges(most: int) -> Callable[..., range]:
    """`range`, as long as all of them together are not too long."""
    left = most

    def limited(*limits: int) -> range:
        nonlocal left
        found = range(*limits)
        left -= len(found)
        if left < 0:
            raise ValueError(f"loops of more than {most} steps")
        return found

    return limited


def _as_json(value: Any, **options: Any) -> str:
    """As transformers has this filter: nothing is escaped for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _render(template: str, names: Mapping[str, str], messages: list[dict[str, str]]) -> str:
    """The conversation as the template has it, without a beginning of a further answer; "" if it fails."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks what an assistant said."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> str:
        raise ValueError(message)

    try:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda *_, **__: "1 January 2000"}
        environment.globals["range"] = _ranges(MOST_STEPS)
        environment.filters["tojson"] = _as_json
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
        pieces = environment.from_string(template).generate(**{**names, **given})
        return "".join(islice(pieces, MOST_PIECES))
    except Exception:  # a template is a program of its author's; one that fails says nothing of what ends a turn
        return ""
