"""The examples in the docstrings of the four main doors run, and print what they say."""

import doctest

import pytest

import fastkv_jax as fk


@pytest.mark.parametrize("door", ["load_model", "prefill", "generate", "calibrate"])
def test_the_example_of_a_door(door: str):
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(fk, door), door, globs={})
    assert example.examples
    lines: list[str] = []
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=lines.append).failed == 0, "".join(
        lines
    )
