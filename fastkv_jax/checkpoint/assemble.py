"""From single tensors to a `Llama`: one stacked parameter at a time, so the host holds one copy of one parameter."""

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from fastkv_jax.errors import CheckpointError
from fastkv_jax.model import sharding
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.llama import Llama

Read = Callable[[str, int | None], np.ndarray]
Label = Callable[[str, int | None], str]

LISTED = 10


def abstract_model(config: LlamaConfig, dtype: Any, mesh: Mesh | None) -> Llama:
    """A `Llama` of shapes and dtypes: no memory, no random numbers."""
    return nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0), dtype, mesh))


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter as a checkpoint stores it: for those of the layers, the shape of one layer."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_model(config, jnp.float32, None))
    return {sharding.parameter_name(path): leaf.shape[is_stacked(path) :] for path, leaf in leaves}


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether a pytree path leads into the stacked layers."""
    return path[0].name == "layers"


def assemble(
    config: LlamaConfig, read: Read, dtype: Any, mesh: Mesh | None, progress: bool, label: Label = "{}".format
) -> Llama:
    """Build the model from `read(name, layer)`, which returns one tensor; `layer` is None outside the layers.

    `label(name, layer)` is the tensor's name in its file, for messages. `progress` draws a bar of bytes on stderr.
    Raises `CheckpointError` where a cast to float16 overflows, `FastKVConfigError` if the mesh does not fit.
    """
    if mesh is not None:
        sharding.check_mesh(mesh, config)
    abstract = abstract_model(config, dtype, mesh)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", file=sys.stderr, disable=not progress) as bar:

        def build(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = sharding.parameter_name(path)
            if not is_stacked(path):
                values = cast(read(name, None), leaf.dtype, label(name, None))
                values = values if values.flags.writeable else values.copy()  # never alias a mapped file
                bar.update(values.nbytes)
            else:
                values = aligned_empty(leaf.shape, leaf.dtype)
                for i in range(config.num_layers):
                    values[i] = cast(read(name, i), leaf.dtype, label(name, i))
                    bar.update(values[i].nbytes)
            return place(values, mesh, name)

        return jax.tree_util.tree_map_with_path(build, abstract)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory at a 64-byte boundary, which JAX on the CPU takes over without copying."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def place(values: np.ndarray, mesh: Mesh | None, name: str) -> jax.Array:
    """Move one parameter to its device or devices, and wait, so that the host buffer can go."""
    if mesh is None:
        return jax.device_put(values).block_until_ready()
    where = sharding.sharding_for(mesh, name)
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index]).block_until_ready()


def cast(values: np.ndarray, dtype: Any, label: str) -> np.ndarray:
    """`values` in `dtype`, not copied if it already is. Raises `CheckpointError` if float16 cannot hold a value."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(dtype)
    if result.dtype == np.float16 and np.isinf(result).any() and not np.isinf(values).any():
        peak = float(np.max(np.abs(values)))
        raise CheckpointError(f"tensor {label} reaches {peak:.4g}, beyond float16's 65504; use bfloat16 or float32")
    return result


def check_finite(model: Llama, source: str, label: Label) -> None:
    """Raise `CheckpointError` naming the tensors that hold NaN or infinity."""
    bad: list[str] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        name, stacked = sharding.parameter_name(path), is_stacked(path)
        finite = np.asarray(jnp.isfinite(leaf).all(axis=tuple(range(int(stacked), leaf.ndim))))
        bad += [label(name, int(i) if stacked else None) for i in np.flatnonzero(~finite)]
    if bad:
        raise CheckpointError(f"{source}: NaN or infinity in {listed(bad)}")


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
