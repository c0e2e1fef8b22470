"""Our own checkpoint: config.json with a format marker, weights/ written by Orbax, tokenizer files copied along.

Locally a checkpoint is complete or absent: it is written beside its target and renamed. On remote storage there is no
rename: Orbax commits weights/ itself and config.json, without which nothing is loaded, goes last.
"""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from fastkv_jax.checkpoint.assemble import abstract_model, check_finite, listed
from fastkv_jax.checkpoint.quiet import quiet
from fastkv_jax.checkpoint.tokenizers.end_tokens import Claim, read_json
from fastkv_jax.errors import CheckpointError, FastKVConfigError
from fastkv_jax.files import scratch_in, sync_folder
from fastkv_jax.model import sharding
from fastkv_jax.model.config import Llama3Scaling, LlamaConfig, RopeConfig, token_ids
from fastkv_jax.model.llama import Llama

FORMAT, VERSION = "fastkv_jax", 1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
WriteExtras = Callable[[epath.Path], None]
_SPARE_BYTES = 64 << 20  # tokenizer files, metadata


def save(model: Llama, folder: str | os.PathLike[str], write_extras: WriteExtras | None = None) -> None:
    """Write a checkpoint to `folder`, which must be absent or empty.

    `write_extras(path)` may put more files, a tokenizer's for instance, beside the weights.
    Raises `FastKVConfigError` if the target is occupied, `OSError` if it cannot be written (no space, no rights);
    the target is untouched then.
    """
    target = check_target(folder)
    if is_remote(target):
        _write(model, target, write_extras)
        return
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(model, target.parent)
    with scratch_in(Path(target.parent)) as scratch:
        complete = epath.Path(scratch / target.name)
        _write(model, complete, write_extras)
        _sync(complete)
        os.replace(complete, target)
        sync_folder(target.parent)


def check_target(folder: str | os.PathLike[str]) -> epath.Path:
    """Raise `FastKVConfigError` unless `folder` is absent or empty."""
    target = epath.Path(folder)
    try:
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except ImportError as error:  # the library behind gs:// or s3:// is an extra
        raise FastKVConfigError(f"cannot write to {folder}: {error}") from error
    if occupied:
        raise FastKVConfigError(f"{target} exists and is not an empty folder; choose another one or remove it")
    return target


def copy_tokenizer_files(source: epath.Path) -> WriteExtras:
    """For `save`: copies what the folder `source` has of a tokenizer."""

    def write(folder: epath.Path) -> None:
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                (folder / name).write_bytes((source / name).read_bytes())

    return write


def is_ours(folder: epath.Path) -> bool:
    """Whether a folder's config.json carries our format marker."""
    try:
        return json.loads((folder / "config.json").read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def is_remote(path: epath.Path) -> bool:
    """Whether a path is on remote storage such as gs://, where files are not renamed."""
    return "://" in os.fspath(path)


def inspect(folder: epath.Path) -> LlamaConfig:
    """Read the config, and compare it with the names and shapes of the weights. Reads no weights."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text())
        version = content.get("version")
        if content.get("format") != FORMAT or version != VERSION:
            raise CheckpointError(f"{file}: format version {version!r} is not supported; supported: {VERSION}")
        config = _parse(content["config"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file} is damaged ({reason}); convert the model again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    _check_shapes(folder / "weights", config)
    return config


def declared_ends(folder: epath.Path) -> list[Claim]:
    """The end tokens named by the source's generation_config.json, which came along, and by the conversion."""
    generation = read_json(folder / "generation_config.json")
    config = read_json(folder / "config.json").get("config", {})
    return [
        ("generation_config.json", token_ids(generation, "eos_token_id", str(folder / "generation_config.json"))),
        ("config.json", token_ids(config, "stop_tokens", str(folder / "config.json"))),
    ]


def load(folder: epath.Path, config: LlamaConfig, dtype: Any, mesh: Mesh | None, *, check_weights: bool) -> Llama:
    """The model in `dtype`; each device reads its own part of the weights.

    Without a mesh the model is on this process's first device. A process waits for others only where the mesh has
    devices of theirs.
    """
    if mesh is not None:
        sharding.check_mesh(mesh, config)
    single = SingleDeviceSharding(jax.local_devices()[0])

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = single if mesh is None else sharding.sharding_for(mesh, path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    abstract = jax.tree_util.tree_map_with_path(placed, abstract_model(config, dtype, mesh))
    paths = [_key(path) for path, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]]
    wanted = dict(zip(paths, jax.tree.leaves(abstract), strict=True))
    arrays = _restore(
        folder / "weights", wanted, alone=mesh is None or set(mesh.devices.flat) <= set(jax.local_devices())
    )
    model = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in paths])
    # A cast to float16 happens inside Orbax, so an overflow shows only as infinity.
    if check_weights or np.dtype(dtype) == np.float16:
        check_finite(model, f"{folder} in {np.dtype(dtype).name}", _label)
    return model


def _check_shapes(weights: epath.Path, config: LlamaConfig) -> None:
    stored = _stored_shapes(weights)
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_model(config, np.float32, None))
    wanted = {_key(path): leaf.shape for path, leaf in leaves}
    names = sorted(name for name in stored | wanted if stored.get(name) != wanted.get(name))
    if names:
        wrong = [f"{name} is {stored.get(name, 'absent')}, expected {wanted.get(name, 'absent')}" for name in names]
        raise CheckpointError(f"{weights} does not fit config.json: {listed(wrong)}; convert the model again")


def _stored_shapes(weights: epath.Path) -> dict[str, tuple[int, ...]]:
    if not (weights / "_METADATA").exists():
        raise CheckpointError(f"{weights} is missing or incomplete; convert the model again")
    try:
        with quiet(), _reader(alone=True) as checkpointer:
            metadata = checkpointer.metadata(_absolute(weights)).item_metadata
        if metadata is None:
            raise ValueError("damaged metadata")
        return {name: tuple(array.shape) for name, array in metadata.tree.items()}
    except Exception as error:  # a damaged checkpoint raises whatever the damaged layer raises
        raise CheckpointError(f"{weights} cannot be read: {_first_line(error)}; convert the model again") from error


def _write(model: Llama, folder: epath.Path, write_extras: WriteExtras | None) -> None:
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    state = {_key(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "weights", state)
    except Exception as error:  # Orbax and tensorstore raise many types, full disks included
        full = "no space" in str(error).lower() or getattr(error, "errno", None) == errno.ENOSPC
        number, reason = errno.ENOSPC if full else errno.EIO, f"cannot write the weights: {_first_line(error)}"
        raise OSError(number, reason, str(folder)) from error
    if write_extras is not None:
        write_extras(folder)
    content = {"format": FORMAT, "version": VERSION, "config": dataclasses.asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _reader(*, alone: bool) -> Any:
    """Orbax's reader; `alone`: of several processes this one waits for no other."""
    import orbax.checkpoint as ocp

    if not alone or jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _restore(weights: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct], *, alone: bool) -> dict[str, jax.Array]:
    try:
        with quiet(), _reader(alone=alone) as checkpointer:
            return checkpointer.restore(_absolute(weights), dict(abstract))
    except Exception as error:  # a damaged checkpoint raises whatever the damaged layer raises
        raise CheckpointError(f"{weights} cannot be restored: {_first_line(error)}; convert the model again") from error


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax finds nothing by a relative path."""
    return path if is_remote(path) else path.absolute()


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _key(path: tuple[Any, ...]) -> str:
    """The name of a parameter in weights/: "layers.wq" for (.layers, .wq, .value)."""
    return ".".join(key.name for key in path if key.name != "value")


def _label(name: str, layer: int | None) -> str:
    return name if layer is None else f"layers.{name}[{layer}]"


def _parse(fields: Mapping[str, Any]) -> LlamaConfig:
    rope = dict(fields["rope"])
    if isinstance(rope["scaling"], dict):
        rope["scaling"] = Llama3Scaling(**rope["scaling"])
    elif isinstance(rope["scaling"], list):
        rope["scaling"] = tuple(rope["scaling"])
    stop_tokens = tuple(fields["stop_tokens"])
    return LlamaConfig(**{**fields, "rope": RopeConfig(**rope), "stop_tokens": stop_tokens})


def _check_space(model: Llama, folder: epath.Path) -> None:
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model)) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free", str(folder))


def _sync(folder: epath.Path) -> None:
    """Flush our own files to disk before the rename makes them visible; Orbax flushes its own."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)
