"""What a chat template writes behind an answer: a token there ends the model's turn, whatever else the files say."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

MOST_PIECES = 100_000  # of a rendered conversation: a loop in a template can render gigabytes
_ANSWER, _NEXT = "An answer, by its own words.", "Another question, by its own words."


def turn_ends(template: str, names: Mapping[str, str], special: Mapping[str, int]) -> tuple[int, ...]:
    """The special token that the template puts right behind an answer, if it puts one there.

    `names` are the template's variables (`eos_token`, ...), `special` the ids of special tokens by their texts. A
    template that cannot be rendered says nothing.
    """
    question, answer = {"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}
    following = {"role": "user", "content": _NEXT}
    for messages in ([question, answer], [question, answer, following]):
        rendered = _render(template, names, messages)
        tail = rendered[rendered.rfind(_ANSWER) + len(_ANSWER) :].lstrip() if _ANSWER in rendered else ""
        found = [text for text in special if text and tail.startswith(text)]
        if found:
            return (special[max(found, key=len)],)
    return ()


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
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "1 January 2000"}
        pieces = environment.from_string(template).generate(messages=messages, add_generation_prompt=False, **names)
        return "".join(islice(pieces, MOST_PIECES))
    except Exception:  # a template is a program of its author's; one that fails says nothing of what ends a turn
        return ""
