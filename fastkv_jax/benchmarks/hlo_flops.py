"""Floating-point operations of a compiled program, from XLA's own text: loops count as often as they turn.

Matrix products are counted wherever they stand, as `dot`, as the convolutions a TPU makes of them, or in a library's
call; attention kernels by the causal half of their shapes. Other kernels and element-wise work do not count.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ATTENTION = re.compile(r"__cudnn\$fmha|splash")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: tuple[int, ...]  # of the result, of a tuple its largest part's
    kind: str
    operands: list[str]
    rest: str  # what follows the opening bracket


Computation = dict[str, Instruction]


def flops(text: str) -> float:
    """Operations of the entry computation, two for each multiplication and addition."""
    computations, entry = _parse(text)
    known: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in known:
            known[name] = sum(_of_instruction(i, computations[name], computations, of) for i in
                              computations[name].values())  # fmt: skip
        return known[name]

    return of(entry)


def _of_instruction(i: Instruction, among: Computation, computations: dict[str, Computation], of) -> float:
    called = re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", i.rest)
    if i.kind == "while":
        return _turns(i, computations) * of(called[0])
    if i.kind in ("fusion", "call", "async-start"):
        return sum(map(of, called))
    if i.kind == "conditional":
        branches = re.findall(r"branch_computations=\{([^}]*)\}", i.rest)
        names = re.findall(r"[\w.\-]+", branches[0]) if branches else re.findall(r"_computation=%?([\w.\-]+)", i.rest)
        return max(map(of, names), default=0.0)
    if i.kind == "dot":
        left = among[i.operands[0]].shape
        return 2.0 * math.prod(i.shape) * math.prod(left[d] for d in _numbers(r"lhs_contracting_dims=\{([^}]*)\}", i))
    if i.kind == "convolution":
        return _convolution(i, among)
    if i.kind == "custom-call" and _ATTENTION.search(i.name + i.rest):
        *heads, tokens, dim = i.shape
        return 2.0 * math.prod(heads) * dim * tokens * (tokens + 1)
    if i.kind == "custom-call" and "$matmul" in i.rest:
        left = among[i.operands[0]].shape
        contracted = re.findall(r'"lhs_contracting_dimensions":\["(\d+)"', i.rest)
        return 2.0 * math.prod(i.shape) * math.prod(left[int(d)] for d in contracted)
    return 0.0


def _turns(i: Instruction, computations: dict[str, Computation]) -> int:
    """How often a loop turns: as XLA knows it, or the largest constant that its condition looks at."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', i.rest)
    if known:
        return int(known[1])
    found: list[int] = []
    names = re.findall(r"condition=%?([\w.\-]+)", i.rest)
    while names:
        for inside in computations[names.pop()].values():
            names += re.findall(r"calls=%?([\w.\-]+)", inside.rest)
            found += [int(inside.rest.split(")")[0])] if inside.kind == "constant" and not inside.shape else []
    return max(found, default=1)


def _convolution(i: Instruction, among: Computation) -> float:
    """A product that a TPU writes as a convolution: padding multiplies nothing."""
    left, right = (among[name].shape for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels, i.rest
    l_names, r_names, o_names = labels.groups()
    total = 2.0 * right[r_names.index("i")] * math.prod(i.shape[o_names.index(d)] for d in "bf")
    for d in (name for name in r_names if name.isdigit()):
        n, taps, out = left[l_names.index(d)], right[r_names.index(d)], i.shape[o_names.index(d)]
        given = {key: _window(key, i, int(d)) for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")}
        stride, before = given["stride"] or "1", (given["pad"] or "0_0").split("_")[0]
        spread = int(given["lhs_dilate"] or 1), int(given["rhs_dilate"] or 1)
        places = (o * int(stride) - int(before) + k * spread[1] for o in range(out) for k in range(taps))
        total *= sum(p % spread[0] == 0 and 0 <= p // spread[0] < n for p in places)
    return total


def _window(key: str, i: Instruction, dimension: int) -> str | None:
    found = re.search(rf"window=\{{[^}}]*\b{key}=([\w\-x]+)", i.rest)
    return found[1].split("x")[dimension] if found else None


def _numbers(pattern: str, i: Instruction) -> list[int]:
    found = re.search(pattern, i.rest)
    return [int(d) for d in found[1].split(",") if d] if found else []


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, now = "", {}
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            now = computations.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
        elif body := _LINE.match(line):
            name, kind, operation, rest = body.groups()
            now[name] = Instruction(name, _shape(kind), operation, list(_operands(rest)), rest)
    return computations, entry


def _shape(kind: str) -> tuple[int, ...]:
    found = [tuple(int(d) for d in dims.split(",") if d) for dims in re.findall(r"\[([\d,]*)\]", kind)]
    return max(found, key=math.prod, default=())


def _operands(rest: str) -> Iterator[str]:
    """Names up to the bracket that closes the first."""
    depth, end = 1, 0
    while end < len(rest) and depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    yield from re.findall(r"%([\w.\-]+)", rest[: end - 1])
