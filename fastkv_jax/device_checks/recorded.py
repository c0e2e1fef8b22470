"""Step `recorded`: runs of the published code, repeated on this device through the library's own doors.

In float32, as they were recorded; then the same model in bfloat16 with the platform's kernels and attention, against
plain jax.numpy on the same device. What the recordings hold is in tests/golden/README.md.
"""

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastkv_jax import checkpoint
from fastkv_jax.benchmarks.kernel_cases import FLOAT8
from fastkv_jax.buckets import pad_batch
from fastkv_jax.decoding.loop import generate
from fastkv_jax.device_checks.kernels.inputs import check_float8
from fastkv_jax.device_checks.results import WRONG, Check, Missing, Outcome, within
from fastkv_jax.device_checks.tolerances import LEAST_COMMON, LOGITS, LOGITS_BFLOAT16
from fastkv_jax.methods import METHODS, Method
from fastkv_jax.model.llama import Llama
from fastkv_jax.prefilling.doors import Prefill, prefill

FOLDER = Path(__file__).parents[2] / "tests" / "golden" / "reference"  # of a repository, not of an installed wheel
CASES = ("A_fastkv_n256_b1_p25-t50_avg", "A_fullkv_n256_b1_full", "A_snapkv_n256_b1_p25_avg")
STEPS = 17


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """Three recordings; then the first in bfloat16, unless `quick` the others, too, and caches of 8 bits."""
    if not FOLDER.is_dir():
        raise Missing(f"no recordings at {FOLDER}: run this from the repository")
    for name in CASES:
        yield Check(f"{name}, float32", partial(_as_recorded, name))
    pairs = [*((name, None) for name in CASES), (CASES[0], "int8"), (CASES[0], FLOAT8)]
    for name, kind in pairs[:1] if quick else pairs:
        cached = f", {kind} cache" if kind else ""
        yield Check(f"{name}, bfloat16{cached}, against jax.numpy", partial(_as_plain, platform, name, kind))


@cache
def _model(dtype: str) -> Llama:
    return checkpoint.load_model(FOLDER / "models" / "A", dtype)


def _case(name: str) -> tuple[dict[str, np.ndarray], Method]:
    """The recording, and its method as the published code has it."""
    with np.load(FOLDER / "cases" / f"{name}.npz") as data:
        recorded = dict(data)
    meta = json.loads(str(recorded["meta"]))
    method = meta["method"].replace("fullkv", "full")
    settings: dict[str, Any] = {}
    if method != "full":
        names = {"retention_rate": "retain_rate", "window_size": "window_size", "kernel_size": "kernel_size"}
        settings = {ours: meta[theirs] for ours, theirs in names.items()}
        settings["pooling"] = meta["pooling"].removesuffix("pool")
    if method == "fastkv":
        settings |= {"tsp_layer": meta["tsp_idx"], "tsp_rate": meta["tsp_rate"]}
    return recorded, METHODS[method].reference(**settings) if settings else METHODS[method]()


def _kept(prompt: Prefill) -> list[list[np.ndarray]]:
    """Positions in ascending order, of each layer and head of the one row."""
    layers = [np.asarray(prompt.cache.layer(i).positions)[0] for i in range(prompt.cache.k_new.shape[0])]
    return [[head[head >= 0] for head in layer] for layer in layers]


def _as_recorded(name: str) -> Outcome:
    recorded, method = _case(name)
    tokens, start = pad_batch(list(recorded["input_ids"]), 384)
    options: dict[str, Any] = {"method": method, "max_new_tokens": STEPS}
    with jax.default_matmul_precision("highest"):
        prompt = prefill(_model("float32"), tokens, start, **options)
        made = np.asarray(generate(_model("float32"), tokens, start, stop_tokens=(), **options).tokens)[0]
    faults = [word for word, bad in (
        ("other entries kept", not _same_entries(prompt, recorded)),
        ("other tokens went on", not _same_rows(prompt, recorded)),
        ("other tokens made", made.tolist() != recorded["gen_tokens"][0].tolist()),
    ) if bad]  # fmt: skip
    error = float(np.abs(np.asarray(prompt.logits[0]) - recorded["prefill_logits"][0]).max())
    outcome = within(error, LOGITS, "; ".join(faults or ["logits; entries and tokens equal"]))
    return outcome._replace(status=WRONG) if faults else outcome


def _same_entries(prompt: Prefill, recorded: dict[str, np.ndarray]) -> bool:
    everything = np.arange(recorded["input_ids"].shape[1])
    for i, heads in enumerate(_kept(prompt)):
        theirs = np.sort(recorded[f"kept_pos_{i}"][0]) if f"kept_pos_{i}" in recorded else [everything] * len(heads)
        if not all(map(np.array_equal, heads, theirs)):
            return False
    return True


def _same_rows(prompt: Prefill, recorded: dict[str, np.ndarray]) -> bool:
    if prompt.propagated is None or "tsp_idx" not in recorded:
        return prompt.propagated is None and "tsp_idx" not in recorded
    ours = np.asarray(prompt.propagated)[0]
    return np.array_equal(ours[ours >= 0], recorded["tsp_idx"][0])


def _as_plain(platform: str, name: str, kv_dtype: str | None) -> Outcome:
    """Three ragged rows."""
    if kv_dtype == FLOAT8:
        check_float8(platform)
    recorded, method = _case(name)
    row = recorded["input_ids"][0]
    tokens, start = pad_batch([row, row[:80], row[56:]], 384)
    options: dict[str, Any] = {"method": method, "max_new_tokens": 12, "kv_dtype": kv_dtype}
    plain: dict[str, Any] = {"platform": "cpu", "kernels": "reference"}
    model = _model("bfloat16")
    read, made = [], []
    for more in ({}, plain):
        read.append(prefill(model, tokens, start, **options, **more))
        made.append(np.asarray(generate(model, tokens, start, stop_tokens=(), **options, **more).tokens))
    error = float(np.abs(_difference(*read)).max())
    common = _common(*read)
    same = float((made[0] == made[1]).mean())
    outcome = within(error, LOGITS_BFLOAT16, f"logits; {common:.1%} of entries and {same:.0%} of tokens equal",
                     entries_common=common, tokens_equal=same)  # fmt: skip
    return outcome if common >= LEAST_COMMON else outcome._replace(status=WRONG)


def _common(ours: Prefill, theirs: Prefill) -> float:
    """Share of the entries that both have kept."""
    both = total = 0
    for mine, other in zip(ours.cache.segments, theirs.cache.segments, strict=True):
        heads = (np.asarray(a.positions).reshape(-1, a.positions.shape[-1]) for a in (mine, other))
        for a, b in zip(*heads, strict=True):
            both += np.intersect1d(a[a >= 0], b[b >= 0]).size
            total += (b >= 0).sum()
    return float(both / total)


def _difference(ours: Prefill, theirs: Prefill) -> np.ndarray:
    return np.asarray(ours.logits, np.float32) - np.asarray(theirs.logits, np.float32)
