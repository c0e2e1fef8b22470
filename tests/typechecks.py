"""What annotations are checked for while the suite runs: shapes and dtypes of arrays, by beartype.

Other mistakes of a caller are for the doors to name; and a pytree's own constructor takes whatever JAX puts in its
leaves: tracers, shapes, None.
"""

import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping


def holds_array(hint: Any) -> bool:
    """Whether a shape stands in it."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(holds_array(part) for part in typing.get_args(hint))


def shapes(function: Callable) -> Callable:
    """`function`, which jaxtyping has made from a signature, with its arrays checked."""
    if function.__name__ == "__init__":
        return function
    hints = {name: hint for name, hint in function.__annotations__.items() if holds_array(hint)}
    function.__annotations__ = hints
    return beartype.beartype(function) if hints else function
