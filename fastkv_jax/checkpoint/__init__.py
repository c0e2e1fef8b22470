"""Model files: `resolve` finds out what a source is, `inspect` reads its config, `load_model` its weights.

Only local files are opened; nothing a model folder contains is executed.
"""

import dataclasses
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from fastkv_jax.checkpoint import hugging_face, known_models, orbax
from fastkv_jax.checkpoint.gguf import file as gguf_file
from fastkv_jax.checkpoint.gguf import weights as gguf_weights
from fastkv_jax.checkpoint.tokenizers.end_tokens import Claim, Vocabulary, end_tokens, vocabulary_of_folder
from fastkv_jax.errors import CheckpointError, FastKVConfigError, ModelWarning
from fastkv_jax.model import sharding
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.llama import Llama

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")
_LLAMA_3_THETA, _LLAMA_3_CONTEXT = 500_000.0, 8192  # of Llama 3, before positions were scaled
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Resolved:
    """What a source turned out to be: its kind ("hugging_face", "gguf" or "orbax"), where it is, what to call it."""

    kind: str
    path: epath.Path
    name: str
    tokenizer: "Resolved | None" = None  # brought along from elsewhere; None: the model's own


def resolve(
    source: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None, progress: bool = False
) -> Resolved:
    """Find a model: a folder (Hugging Face or ours), a .gguf file, a known name, or a Hub id, in this order.

    `tokenizer` is another such source, whose tokenizer is used instead of the model's own; of a folder, a tokenizer's
    files are enough. Known names and Hub ids are downloaded if they are not in the cache; `progress` shows that on
    stderr. Raises `CheckpointError` for anything else.
    """
    found = _resolve(source, progress)
    if tokenizer is None:
        return found
    folder = epath.Path(tokenizer)
    if "://" not in os.fspath(tokenizer) and (folder / "tokenizer.json").is_file():
        return dataclasses.replace(found, tokenizer=Resolved("hugging_face", folder, folder.name))
    return dataclasses.replace(found, tokenizer=_resolve(tokenizer, progress))


def _resolve(source: str | os.PathLike[str], progress: bool) -> Resolved:
    text = os.fspath(source)
    if not text or "\0" in text:
        raise CheckpointError(f"model {text!r} is not a path or name; {_allowed()}")
    if "://" in text:
        return _resolve_remote(text)
    path = epath.Path(text)
    if path.is_dir():
        return _resolve_folder(path)
    if path.is_file():
        return _resolve_file(path)
    if text in known_models.names():
        if (hub := known_models.hub_id(text)) is not None:
            return Resolved("hugging_face", epath.Path(_download(hub, progress)), text)
        return Resolved("gguf", epath.Path(known_models.fetch(text, quiet=not progress)), text)
    if _HUB_ID.fullmatch(text) and not text.endswith((".gguf", ".safetensors")):
        return Resolved("hugging_face", epath.Path(_download(text, progress)), text)
    raise CheckpointError(f"model {text!r}: no such file or folder; {_allowed()}")


def inspect(source: str | os.PathLike[str] | Resolved) -> LlamaConfig:
    """The config of a model, after all checks that need no weights."""
    found = source if isinstance(source, Resolved) else resolve(source)
    match found.kind:
        case "gguf":
            config = gguf_weights.inspect(Path(found.path))
        case "orbax":
            config = orbax.inspect(found.path)
        case _:
            config = hugging_face.inspect(Path(found.path))
    _doubt_positions(config, found)
    ends = end_tokens(_declared_ends(found), _vocabulary(found), config.vocab_size, os.fspath(found.path))
    return dataclasses.replace(config, stop_tokens=ends)


def declared_end_tokens(source: str | os.PathLike[str] | Resolved) -> tuple[int, ...]:
    """The tokens that end an answer by the first of the model's own files that names any, as other programs have it."""
    found = source if isinstance(source, Resolved) else resolve(source)
    return next((ids for _, ids in _declared_ends(found) if ids), ())


def _declared_ends(found: Resolved) -> list[Claim]:
    match found.kind:
        case "gguf":
            return gguf_weights.declared_ends(Path(found.path))
        case "orbax":
            return orbax.declared_ends(found.path)
        case _:
            return hugging_face.declared_ends(Path(found.path))


def _vocabulary(found: Resolved) -> Vocabulary:
    found = found.tokenizer or found
    return gguf_weights.vocabulary(Path(found.path)) if found.kind == "gguf" else vocabulary_of_folder(found.path)


def _doubt_positions(config: LlamaConfig, found: Resolved) -> None:
    """Say so if this looks like a Llama 3.1 or later without its scaled positions, as early converters wrote them."""
    longest, rope = config.max_position_embeddings, config.rope
    if rope.theta == _LLAMA_3_THETA and rope.scaling is None and longest > _LLAMA_3_CONTEXT:
        field = "rope_freqs.weight" if found.kind == "gguf" else "rope_scaling"
        warnings.warn(
            f"{found.path}: a context of {longest:,} at rope theta {rope.theta:,.0f}, but no {field}: positions are"
            f" not scaled. If this is Llama 3.1 or later, prompts are read wrongly, those beyond {_LLAMA_3_CONTEXT:,}"
            " tokens most; convert it again",
            ModelWarning,
            stacklevel=3,
        )


def load_model(
    source: str | os.PathLike[str] | Resolved,
    dtype: Any = "bfloat16",
    mesh: Mesh | None = None,
    *,
    check_weights: bool = False,
    progress: bool = False,
) -> Llama:
    """Load a model's weights; needs no tokenizer.

    Args:
        source: a Hugging Face or Orbax folder, a .gguf file, a Hub id, or a known name such as "smollm2-135m"
        dtype: of weights and activations; a GPU multiplies float32 as such, without its tensor cores and cuDNN's
            attention (default: "bfloat16")
        mesh: devices to spread the weights over (default: None, the first one)
        check_weights: look for NaN and infinity (default: False)
        progress: draw a bar on stderr (default: False)

    Raises:
        FastKVConfigError: for a dtype or mesh that cannot work
        CheckpointError: for files that cannot

    Examples:
        >>> import fastkv_jax as fk
        >>> model = fk.load_model("smollm2-135m", dtype="float32")
        >>> model.config.num_layers, model.config.num_kv_heads, model.dtype.name
        (30, 3, 'float32')
    """
    dtype = parse_dtype(dtype)
    found = source if isinstance(source, Resolved) else resolve(source, progress=progress)
    config = inspect(found)
    mesh = None if mesh is None else sharding.automatic(mesh)
    match found.kind:
        case "gguf":
            return gguf_weights.load(
                Path(found.path), config, dtype, mesh, check_weights=check_weights, progress=progress
            )
        case "orbax":  # Orbax has no progress to show
            return orbax.load(found.path, config, dtype, mesh, check_weights=check_weights)
        case _:
            return hugging_face.load(
                Path(found.path), config, dtype, mesh, check_weights=check_weights, progress=progress
            )


def parse_dtype(dtype: Any) -> np.dtype:
    """One of the three dtypes, from its name or a JAX or NumPy dtype; else `FastKVConfigError`."""
    try:
        parsed = np.dtype(DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        parsed = None
    if dtype is None or parsed is None or parsed.name not in DTYPES:
        raise FastKVConfigError(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return parsed


def _allowed() -> str:
    return (
        "allowed: a model folder, a .gguf file, a Hub id such as org/name,"
        f" or a known name ({', '.join(known_models.names())})"
    )


def _resolve_remote(url: str) -> Resolved:
    try:
        path = epath.Path(url)
        if orbax.is_ours(path):
            return Resolved("orbax", path, path.name)
    except Exception as error:  # each storage library has its own
        cause = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot reach {url}: {cause[:300]}") from error
    raise CheckpointError(f"{url} is not a converted checkpoint, and nothing else is read from remote storage; copy it")


def _resolve_folder(path: epath.Path) -> Resolved:
    name = path.name or path.resolve().name
    if orbax.is_ours(path):
        return Resolved("orbax", path, name)
    if (path / "config.json").exists() or any(entry.suffix == ".safetensors" for entry in path.iterdir()):
        return Resolved("hugging_face", path, name)
    ggufs = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".gguf")
    hint = f"it holds {ggufs[0]}: pass that file's path" if ggufs else _allowed()
    raise CheckpointError(f"{path} is a folder without config.json, so not a model; {hint}")


def _resolve_file(path: epath.Path) -> Resolved:
    if piece := gguf_file.PIECE.fullmatch(path.name):
        raise CheckpointError(
            f"{path} is a piece of {piece['whole']}, cut in the middle of its bytes; join all pieces first, in order:"
            f" cat {piece['whole']}{path.name[piece.end('whole')]}* > {piece['whole']}"
        )
    with path.open("rb") as stream:
        magic = stream.read(4)
    if path.suffix == ".gguf" or magic == b"GGUF":
        part = gguf_file.PART.fullmatch(path.name)
        return Resolved("gguf", path, part["name"] if part else path.stem)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one weights file; pass the folder that holds it and its config.json")
    raise CheckpointError(f"{path} is not a model file (it starts with {magic!r}); {_allowed()}")


def _download(name: str, progress: bool) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from tqdm.asyncio import tqdm_asyncio

    class Bar(tqdm_asyncio):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": not progress}))

    # Mistral repositories hold the weights a second time, as consolidated*.safetensors; subfolders are other formats.
    skipped = ["*/*", "consolidated*"]
    try:
        return snapshot_download(name, allow_patterns=list(HUB_PATTERNS), ignore_patterns=skipped, tqdm_class=Bar)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name!r} is no local folder, and the Hugging Face Hub says: {cause[:300]}; {_allowed()}"
        ) from error
