"""Where each array lives on a device mesh.

    axis "model"      weights and heads are split: one table for the weights
    axis "data"       rows of the batch are split; every group of devices has all weights
    axis "sequence"   tokens of a prompt are split during prefill; keys and values of a layer are gathered

A mesh has one or more of these axes.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.model.config import LlamaConfig

AXES = DATA, MODEL, SEQUENCE = "data", "model", "sequence"

# Parameters of the layers carry a leading axis L, which is never split.
TABLE: dict[str, P] = {
    "embedding": P(MODEL, None),
    "lm_head": P(MODEL, None),
    "norm": P(),
    "attention_norm": P(),
    "mlp_norm": P(),
    "q_norm": P(),
    "k_norm": P(),
    "wq": P(None, MODEL, None),
    "wk": P(None, MODEL, None),
    "wv": P(None, MODEL, None),
    "bq": P(None, MODEL),
    "bk": P(None, MODEL),
    "bv": P(None, MODEL),
    "wo": P(None, None, MODEL),
    "bo": P(),
    "w_gate": P(None, MODEL, None),
    "w_up": P(None, MODEL, None),
    "w_down": P(None, None, MODEL),
}


def parts_of(tokens: int, mesh: Mesh | None) -> int:
    """Into how many pieces the axis "sequence" splits so many tokens: 1 if it cannot."""
    size = 1 if mesh is None else mesh.shape.get(SEQUENCE, 1)
    return 1 if tokens % size else size


def check_shares(batch: int, tokens: int, mesh: Mesh | None) -> None:
    """Raise `InputError` if rows or columns do not divide: work would be repeated, not shared."""
    for axis, name, size in ((DATA, "rows", batch), (SEQUENCE, "columns", tokens)):
        if mesh is not None and size % mesh.shape.get(axis, 1):
            raise InputError(f"a batch of {size} {name} cannot be split over the mesh axis {axis!r} of "
                             f"{mesh.shape[axis]} devices; it must divide them")  # fmt: skip


def parameter_name(path: tuple[Any, ...]) -> str:
    """The attribute of model.py that a pytree path leads to: (.layers, .wq, .value) is "wq"."""
    return next(key.name for key in reversed(path) if key.name != "value")


def sharding_for(mesh: Mesh, path: str | tuple[Any, ...]) -> NamedSharding:
    """The sharding of one parameter, given by its name or its pytree path."""
    spec = TABLE[path if isinstance(path, str) else parameter_name(path)]
    return NamedSharding(mesh, P(*(axis if axis in mesh.axis_names else None for axis in spec)))


def spec(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> P:
    """The axes that an array of this shape is split over: those that the mesh has and that divide its dimensions."""
    there = (axis if axis in mesh.axis_names and size % mesh.shape[axis] == 0 else None
             for axis, size in zip(axes, shape, strict=False))  # fmt: skip
    return P(*there)


def split(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """x, inside a program, split over `axes` where it can be and whole on every device elsewhere."""
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, x.shape, *axes)))


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with every axis automatic: `jax.make_mesh` makes them explicit, and the model annotates nothing."""
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names)


def check_mesh(mesh: Mesh, config: LlamaConfig) -> None:
    """Raise `FastKVConfigError` unless all axes are known and the size of "model" divides what the table splits."""
    if not mesh.axis_names or not set(mesh.axis_names) <= set(AXES):
        raise FastKVConfigError(f"the mesh has axes {mesh.axis_names}; there are {', '.join(map(repr, AXES))}")
    size = mesh.shape.get(MODEL, 1)
    numbers = {
        "num_kv_heads": config.num_kv_heads,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    uneven = [f"{name} ({number})" for name, number in numbers.items() if number % size]
    if uneven:
        raise FastKVConfigError(
            f"the mesh axis {MODEL!r} has {size} devices, which does not divide {', '.join(uneven)}; use a smaller axis"
        )
