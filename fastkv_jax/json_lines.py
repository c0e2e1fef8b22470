"""JSON lines: a value on each line of a text."""

import json
from collections.abc import Iterator
from typing import Any


def values(text: str) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not empty.

    Raises `json.JSONDecodeError`, whose `lineno` is the line's number in the text. Only "\\n" ends a line: U+2028 and
    its like may stand within JSON strings.
    """
    at = 0
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, text, at + error.pos) from error
            except (ValueError, RecursionError) as error:  # an integer of too many digits; too many brackets
                raise json.JSONDecodeError(str(error), text, at) from error
            yield number, value
        at += len(line) + 1
