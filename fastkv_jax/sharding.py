"""Where each weight lives on a device mesh: one table, tensor parallel over the mesh axis "model"."""

from typing import Any

from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fastkv_jax.config import LlamaConfig
from fastkv_jax.errors import FastKVConfigError

AXIS = "model"

# Parameters of the layers carry a leading axis L, which is never split.
TABLE: dict[str, P] = {
    "embedding": P(AXIS, None),
    "lm_head": P(AXIS, None),
    "norm": P(),
    "attention_norm": P(),
    "mlp_norm": P(),
    "q_norm": P(),
    "k_norm": P(),
    "wq": P(None, AXIS, None),
    "wk": P(None, AXIS, None),
    "wv": P(None, AXIS, None),
    "bq": P(None, AXIS),
    "bk": P(None, AXIS),
    "bv": P(None, AXIS),
    "wo": P(None, None, AXIS),
    "bo": P(),
    "w_gate": P(None, AXIS, None),
    "w_up": P(None, AXIS, None),
    "w_down": P(None, None, AXIS),
}


def parameter_name(path: tuple[Any, ...]) -> str:
    """The attribute of model.py that a pytree path leads to: (.layers, .wq, .value) is "wq"."""
    return next(key.name for key in reversed(path) if key.name != "value")


def sharding_for(mesh: Mesh, path: str | tuple[Any, ...]) -> NamedSharding:
    """The sharding of one parameter, given by its name or its pytree path."""
    return NamedSharding(mesh, TABLE[path if isinstance(path, str) else parameter_name(path)])


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with every axis automatic: `jax.make_mesh` makes them explicit, and the model annotates nothing."""
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names)


def check_mesh(mesh: Mesh, config: LlamaConfig) -> None:
    """Raise `FastKVConfigError` unless the mesh has the axis "model" and its size divides what the table splits."""
    if AXIS not in mesh.axis_names:
        raise FastKVConfigError(f"the mesh has axes {mesh.axis_names}; it needs one named {AXIS!r}")
    size = mesh.shape[AXIS]
    numbers = {
        "num_kv_heads": config.num_kv_heads,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    uneven = [f"{name} ({number})" for name, number in numbers.items() if number % size]
    if uneven:
        raise FastKVConfigError(
            f"the mesh axis {AXIS!r} has {size} devices, which does not divide {', '.join(uneven)}; use a smaller axis"
        )
