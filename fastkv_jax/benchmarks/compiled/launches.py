"""What a GPU's host does for a compiled program: kernels it starts, memory it has copied, answers it waits for."""

from typing import NamedTuple

from fastkv_jax.benchmarks.compiled.program import Instruction, Program, parse

# Names for what is there already, and what only orders others. Whoever calls computations counts by what they hold.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
    "replica-id", "opt-barrier", "async-done", "async-update", "copy-done",
}  # fmt: skip
_MOVES = {"copy", "dynamic-slice", "slice", "pad", "concatenate", "transpose", "reshape", "bitcast", "convert"}
_NOT_WORK = {"parameter", "constant", "iota", "compare", "select", "clamp", "minimum", "maximum", "add", "subtract"}
LARGE = 1 << 20  # bytes from which a copy is worth a word


class Launches(NamedTuple):
    """Of one run of a program, its loops as often as they turn."""

    kernels: int
    inner: int  # kernels in a turn of the largest loop that holds no other: a layer
    large_copies: int  # kernels that only move data and write at least `LARGE` bytes
    host_trips: int  # times the device's answer decides what the host starts next


def launches(text: str) -> Launches:
    """Counted in the text that XLA's compiler for GPUs leaves."""
    program = parse(text)
    return _of(program, program.entry)


def _of(program: Program, name: str) -> Launches:
    kernels = copies = trips = inner = 0
    for i in program.computations[name].values():
        if i.kind == "while":
            turns, body = program.turns(i), _of(program, i.called[0])
            kernels, copies = kernels + turns * body.kernels, copies + turns * body.large_copies
            trips += turns * body.host_trips + (0 if i.known_turns is not None else turns)
            inner = max(inner, body.inner or body.kernels)
        elif i.kind == "conditional":
            longest = max((_of(program, branch) for branch in i.branches), key=lambda one: one.kernels)
            kernels, copies = kernels + longest.kernels, copies + longest.large_copies
            trips, inner = trips + longest.host_trips + 1, max(inner, longest.inner)
        elif i.kind in ("call", "async-start"):
            for one in (_of(program, called) for called in i.called):
                kernels, copies = kernels + one.kernels, copies + one.large_copies
                trips, inner = trips + one.host_trips, max(inner, one.inner)
        elif i.kind not in _FREE:
            kernels += 1
            copies += i.bytes >= LARGE and _only_moves(program, i)
    return Launches(kernels, inner, copies, trips)


def _only_moves(program: Program, i: Instruction) -> bool:
    """A copy, or a fusion of moves; one that updates a part in place writes only that."""
    if i.kind != "fusion":
        return i.kind in _MOVES
    kinds = {inside.kind for name in i.called for inside in program.computations[name].values()}
    return bool(kinds & _MOVES) and kinds <= _MOVES | _NOT_WORK
