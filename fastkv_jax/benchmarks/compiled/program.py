"""A compiled program in XLA's own text: its computations, and how often its loops turn."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_KNOWN = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: tuple[int, ...]  # of the result, of a tuple its largest part's
    bytes: int  # of the result, a tuple's parts together
    kind: str
    operands: list[str]
    rest: str  # what follows the opening bracket
    root: bool  # whether it is the computation's result

    @property
    def called(self) -> list[str]:
        """Computations that it runs, of a loop its body."""
        return re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", self.rest)

    @property
    def branches(self) -> list[str]:
        """Computations of which it runs one."""
        named = re.findall(r"branch_computations=\{([^}]*)\}", self.rest)
        return re.findall(r"[\w.\-]+", named[0]) if named else re.findall(r"_computation=%?([\w.\-]+)", self.rest)

    @property
    def known_turns(self) -> int | None:
        """How often a loop turns, where XLA knows it."""
        found = _KNOWN.search(self.rest)
        return int(found[1]) if found else None


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """All computations by name, and which of them is run."""

    computations: dict[str, Computation]
    entry: str

    def turns(self, i: Instruction) -> int:
        """How often a loop turns: as XLA knows it, or the largest constant that its condition looks at."""
        if i.known_turns is not None:
            return i.known_turns
        found: list[int] = []
        names = re.findall(r"condition=%?([\w.\-]+)", i.rest)
        while names:
            for inside in self.computations[names.pop()].values():
                names += re.findall(r"calls=%?([\w.\-]+)", inside.rest)
                found += (
                    [int(inside.rest.split(")")[0])]
                    if inside.kind == "constant" and not inside.shape and inside.rest[0].isdigit()
                    else []
                )
        return max(found, default=1)


def parse(text: str) -> Program:
    """Of `jax.stages.Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, now = "", {}
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            now = computations.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
        elif body := _LINE.match(line):
            root, name, kind, operation, rest = body.groups()
            shapes = list(_shapes(kind))
            largest = max((shape for shape, _ in shapes), key=math.prod, default=())
            size = sum(math.prod(shape) * width for shape, width in shapes)
            now[name] = Instruction(name, largest, size, operation, list(_operands(rest)), rest, root is not None)
    return Program(computations, entry)


def _shapes(kind: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Dimensions and bytes an element: s32[4,8] is (4, 8), 4."""
    for name, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", kind):
        bits = re.search(r"\d+", name)
        width = 1 if name == "pred" or name.startswith("f8") else int(bits[0]) // 8 if bits else 0
        yield tuple(int(d) for d in dims.split(",") if d), width


def _operands(rest: str) -> Iterator[str]:
    """Names up to the bracket that closes the first."""
    depth, end = 1, 0
    while end < len(rest) and depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    yield from re.findall(r"%([\w.\-]+)", rest[: end - 1])
