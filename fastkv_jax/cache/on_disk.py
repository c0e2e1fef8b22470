"""A compressed cache in a file, to ask a long prompt more questions another day.

One safetensors file: arrays, and in its header what they belong to. A cache means nothing to another model, or to the
same one in another dtype, or behind another tokenizer, so both are identified by fingerprints and compared on loading.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.cache.segment import SegmentKV
from fastkv_jax.checkpoint.safetensors_files import read_header
from fastkv_jax.errors import CheckpointError
from fastkv_jax.files import check_target, replacing
from fastkv_jax.model.llama import Llama

FORMAT = "fastkv_jax cache 1"
ARRAYS = ("k", "v", "positions", "k_scale", "v_scale")  # the last two only of a cache of 8 bits


def save_cache(
    path: str | os.PathLike[str],
    cache: KVCache,
    model: Llama,
    tokenizer: Any = None,
    note: dict[str, Any] | None = None,
) -> None:
    """Write a cache; decoded tokens become prompt entries. Whole or not at all.

    Args:
        path: of the file
        cache: of `prefill`, or after decoding
        model: that made it; another one is refused when it is read
        tokenizer: likewise (default: None, anyone's)
        note: anything JSON can hold, for the caller, see `load_note` (default: None, nothing)

    Raises:
        InputError: for a folder in the way or one that is missing
    """
    from safetensors.flax import save_file

    check_target(path)
    cache = cache.folded()
    arrays = {"position": cache.position}
    for i, segment in enumerate(cache.segments):
        arrays |= {f"{i}.{name}": a for name in ARRAYS if (a := getattr(segment, name)) is not None}
    header = {
        "format": FORMAT,
        "model": fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else "",
        "sharing": json.dumps([segment.sharing for segment in cache.segments]),
        "note": json.dumps(note or {}, allow_nan=False),
    }
    with replacing(path) as scratch:
        save_file({name: jax.device_get(a) for name, a in arrays.items()}, scratch, metadata=header)


def load_cache(path: str | os.PathLike[str], model: Llama, tokenizer: Any = None) -> KVCache:
    """Read a cache back, with no room for new tokens: `prefill(..., cache=...)` makes it.

    Args:
        path: of the file
        model: that goes on with it
        tokenizer: that will make text of it (default: None, not compared)

    Raises:
        CheckpointError: for a damaged file, another model or dtype, or, if both have one, another tokenizer
    """
    header, arrays = _read(path)
    if header["model"] != fingerprint(model):
        raise CheckpointError(f"{path} was made with another model, or with other weights or another dtype of this one")
    if tokenizer is not None and header["tokenizer"] and header["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise CheckpointError(f"{path} was made with another tokenizer")
    segments = tuple(
        SegmentKV(**{name: arrays.get(f"{i}.{name}") for name in ARRAYS}, sharing=sharing)  # type: ignore[arg-type]
        for i, sharing in enumerate(json.loads(header["sharing"]))
    )
    return KVCache.empty_after(segments, arrays["position"], 0, model.config.num_kv_heads, model.dtype)


def load_note(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the caller of `save_cache` left in it."""
    return json.loads(_read(path)[0]["note"])


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, jax.Array]]:
    """(what the header says, arrays) of a cache file."""
    from safetensors import safe_open

    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such cache file")
    names = read_header(file)  # refuses what is no whole safetensors file
    with safe_open(file, framework="flax") as stream:
        header = stream.metadata() or {}
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{file} is no cache of this library (format {header.get('format')!r})")
        return header, {name: stream.get_tensor(name) for name in names}


def fingerprint(model: Llama) -> str:
    """Of the configuration, and of names, shapes, dtypes and the first numbers of all weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        corner = leaf[tuple(slice(0, 8) for _ in leaf.shape)]
        digest.update(np.asarray(corner).tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of the vocabulary and the chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    template = getattr(tokenizer, "chat_template", None) or ""
    return hashlib.sha256(json.dumps([vocabulary, template]).encode()).hexdigest()
