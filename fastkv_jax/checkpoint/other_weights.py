"""What a folder holds beside the weights that are read: said in one line where it could be what was meant.

Silent: the same weights in another layout, as Mistral's consolidated*.safetensors, whose tensors have other names, and
pickled ones beside files with the Hub's standard name.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from fastkv_jax.checkpoint.assemble import listed
from fastkv_jax.checkpoint.safetensors_files import ADAPTER, INDEX, Tensor, read_header
from fastkv_jax.errors import CheckpointError, ModelWarning

_PICKLED = re.compile(r"(pytorch_model|model|consolidated).*\.(bin|pt|pth)")


def doubt_others(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Warn of what is there and is not read, given the tensors that are."""
    names = sorted(path.name for path in folder.iterdir())
    used = sorted({tensor.file.name for tensor in tensors.values()})
    others = [name for name in names if name.endswith(".safetensors") and name not in used]
    same = [name for name in others if _holds_any(folder / name, tensors)]
    standard = INDEX in names or all(name.startswith("model") for name in used)
    pickled = [name for name in names if _PICKLED.fullmatch(name) and not standard]
    if same or pickled:
        _say(folder, f"{listed(used)} is read; {listed(same + pickled)} beside it, another set of weights, is not")
    if adapter := [name for name in names if name == "adapter_config.json" or name.startswith(ADAPTER)]:
        _say(folder, f"the adapter ({listed(adapter)}) is not applied; merge it into the model to use it")


def _holds_any(file: Path, tensors: Mapping[str, Tensor]) -> bool:
    """What is no safetensors file, such as a Git-LFS pointer, holds none."""
    try:
        return not tensors.keys().isdisjoint(read_header(file))
    except (CheckpointError, OSError):
        return False


def _say(folder: Path, words: str) -> None:
    warnings.warn(f"{folder}: {words}", ModelWarning, stacklevel=4)
