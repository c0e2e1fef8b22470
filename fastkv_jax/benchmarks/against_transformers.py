"""The same model in transformers on PyTorch, timed after ours. Needs torch, which this project does not.

Neither leaves the device to the other while it lives: JAX takes most of a GPU's memory, and torch keeps what it had. So
each is a process, ours first, and a folder goes from one to the other.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from fastkv_jax.checkpoint import hugging_face
from fastkv_jax.decoding.loop import CHUNK
from fastkv_jax.errors import BackendError, FastKVConfigError
from fastkv_jax.model.config import Llama3Scaling, LlamaConfig
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.sharding import parameter_name

PEER = (sys.executable, "-m", "fastkv_jax.benchmarks.torch_peer")
SEES_A_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def check_torch() -> None:
    """Raise `FastKVConfigError` without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        raise FastKVConfigError("--peer transformers needs PyTorch: pip install torch")


def hand_over(
    folder: Path,
    model: Llama,
    prompts: dict[int, np.ndarray],
    *,
    weights: bool,
    new_tokens: int,
    repeats: int,
    quiet: bool,
) -> None:
    """Leave in the folder what the peer needs: its task, prompts [B, n] of each length, and our weights if asked for.

    Raises `FastKVConfigError` for a model or a device that is not its.
    """
    c = model.config
    if c.qk_norm or c.qkv_bias != c.output_bias or isinstance(c.rope.scaling, tuple):
        raise FastKVConfigError("--peer transformers is written for Llama's own layers")
    if model.platform == "tpu":
        raise FastKVConfigError("--peer transformers runs on a CPU or a GPU")
    if model.platform == "gpu" and subprocess.run([sys.executable, "-c", SEES_A_GPU], check=False).returncode:
        raise FastKVConfigError("--peer transformers: this PyTorch sees no GPU")
    job = {
        "config": _their_config(c), "dtype": model.dtype.name, "device": "cpu" if model.platform == "cpu" else "cuda",
        "tokens": list(prompts), "new_tokens": new_tokens, "repeats": repeats, "skipped": CHUNK, "quiet": quiet,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _save(folder / "prompts.npz", prompts)
    for path, values in jax.tree_util.tree_leaves_with_path(model) if weights else ():
        name, array = parameter_name(path), np.asarray(values)  # one at a time: the host holds no second model
        layers = enumerate(array) if "{}" in hugging_face.NAMES[name] else [(None, array)]
        tensors = {hugging_face.tensor_name(name, layer): np.ascontiguousarray(a) for layer, a in layers}
        save_file(tensors, folder / f"{name}.safetensors")


def leave_logits(folder: Path, logits: dict[int, np.ndarray]) -> None:
    """Those of the last tokens, for each length."""
    _save(folder / "ours.npz", logits)


def wait_for_peer(folder: Path) -> list[dict[str, Any]]:
    """Its seconds for each length. Raises `BackendError` with its last words."""
    away_from_jax = os.environ | {"JAX_PLATFORMS": "cpu"}  # the package imports it
    done = subprocess.run([*PEER, str(folder)], env=away_from_jax, stdout=subprocess.PIPE, stderr=None, text=True)
    if done.returncode:
        raise BackendError("--peer transformers failed, as it says above")
    return json.loads(done.stdout.splitlines()[-1])


def apart(folder: Path) -> float | None:
    """How far the last tokens' logits of both are apart; None if their weights are not the same."""
    if not any(folder.glob("*.safetensors")):
        return None
    with np.load(folder / "ours.npz") as ours, np.load(folder / "theirs.npz") as theirs:
        return max((float(abs(ours[n] - theirs[n]).max()) for n in theirs), default=None)


def with_rows(found: dict[str, Any], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found of ours, and a row of theirs behind each length's; its shares are of full context's work."""
    rows = list(found["rows"])
    for mine in (row for row in theirs if row["runs"] and "error" not in row):
        full = next(row for row in rows if row["tokens"] == mine["tokens"] and row["name"] == "full")
        row: dict[str, Any] = {
            "tokens": mine["tokens"],
            "name": "transformers",
            "prefill_limit": 1.0,
            "decode_limit": 1.0,
        }
        for part in ("prefill", "decode", "whole"):
            seconds = [run[part] for run in mine["runs"]]
            row[f"{part}_s"] = statistics.median(seconds)
            row[f"{part}_range_s"] = [min(seconds), max(seconds)]
            row[f"{part}_speedup"] = full[f"{part}_s"] / row[f"{part}_s"]
        for share, part in (("share_of_product", "prefill"), ("share_of_copy", "decode")):
            row |= {share: full[share] * row[f"{part}_speedup"]} if share in full else {}
        last = max(i for i, other in enumerate(rows) if other["tokens"] == mine["tokens"])
        rows.insert(last + 1, row)
    return found | {"rows": rows, "peer": "transformers ran after the others, alone, not in turns with them"}


def _save(file: Path, arrays: dict[int, np.ndarray]) -> None:
    named: dict[str, Any] = {str(n): array for n, array in arrays.items()}
    np.savez(file, **named)


def _their_config(c: LlamaConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim, "rms_norm_eps": c.rms_norm_eps, "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings, "attention_bias": c.output_bias, "rope_parameters": _rope(c),
    }  # fmt: skip


def _rope(c: LlamaConfig) -> dict[str, Any]:
    scaling = c.rope.scaling
    if not isinstance(scaling, Llama3Scaling):
        return {"rope_type": "default", "rope_theta": c.rope.theta}
    return {
        "rope_type": "llama3", "rope_theta": c.rope.theta, "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }  # fmt: skip
