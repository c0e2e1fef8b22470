"""Floating-point operations of a compiled program, from XLA's own text: loops count as often as they turn.

Matrix products are counted wherever they stand, as `dot`, as the convolutions a TPU makes of them, or in a library's
call; attention kernels by the causal half of their shapes. Other kernels and element-wise work do not count.
"""

import math
import re

from fastkv_jax.benchmarks.compiled.program import Computation, Instruction, Program, parse

_ATTENTION = re.compile(r"__cudnn\$fmha|splash")


def flops(text: str) -> float:
    """Operations of the entry computation, two for each multiplication and addition."""
    program = parse(text)
    known: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in known:
            among = program.computations[name]
            known[name] = sum(_of_instruction(i, among, program, of) for i in among.values())
        return known[name]

    return of(program.entry)


def _of_instruction(i: Instruction, among: Computation, program: Program, of) -> float:
    if i.kind == "while":
        return program.turns(i) * of(i.called[0])
    if i.kind in ("fusion", "call", "async-start"):
        return sum(map(of, i.called))
    if i.kind == "conditional":
        return max(map(of, i.branches), default=0.0)
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
