"""Parity with the published code on a real model, SmolLM2-135M-Instruct, and real prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
from tolerances import REAL_GAP, REAL_LOGITS, REAL_SET_SHARE

import fastkv_jax as fk
from fastkv_jax.model import Llama

ROOT = Path(__file__).parent / "golden" / "real"
CASES = sorted(path.stem for path in ROOT.glob("*.npz"))
COLUMNS = 1280


@pytest.fixture(scope="module")
def model(smollm2_path) -> Llama:
    return fk.load_model(smollm2_path, dtype="float32")


def method_of(case: str):
    """dev_niah1k_fastkv_r10k21w16: retention 0.1, kernel 21, window 16; TSP layer 14 and rate 0.2 in all."""
    if case.endswith("fullkv"):
        return fk.FullKV()
    retention, rest = case.split("_r")[1].split("k")
    kernel, window = rest.split("w")
    return fk.FastKV.reference(
        tsp_layer=14,
        tsp_rate=0.2,
        retention_rate=int(retention) / 100,
        window_size=int(window),
        kernel_size=int(kernel),
    )


@pytest.mark.parametrize("case", CASES)
def test_real_prompts_are_read_kept_and_answered_as_by_the_published_code(model, case):
    data, method = np.load(ROOT / f"{case}.npz"), method_of(case)
    assert json.loads(str(data["meta"]))
    ids = data["input_ids"].reshape(-1)
    tokens, start = fk.pad_batch([ids], COLUMNS)
    result = fk.prefill(model, tokens, start, method=method, max_new_tokens=32)
    assert np.abs(np.asarray(result.logits[0]) - data["prefill_logits"].reshape(-1)).max() < REAL_LOGITS
    if not case.endswith("fullkv"):
        _check_sets(data, result, len(ids), method)
    out = fk.generate(model, tokens, start, method=method, max_new_tokens=32, stop_tokens=())
    sure = np.minimum.accumulate(data["top2_gap"].reshape(-1) >= REAL_GAP)
    expected = data["tokens"].reshape(-1)
    assert np.array_equal(np.asarray(out.tokens[0])[sure], expected[sure]) and sure[0]


def _check_sets(data, result, n: int, method) -> None:
    """kept_i are rows local to layer i without the window; behind the TSP layer they count propagated rows."""
    passed = np.asarray(result.propagated[0])
    passed = passed[passed >= 0]
    expected = data["tsp_idx"].reshape(-1)
    assert len(passed) == len(expected)
    wrong, total = len(set(passed) - set(expected)), len(expected)
    for i in range(30):
        rows = np.arange(n) if i <= method.tsp_layer else expected
        for head, local in enumerate(data[f"kept_{i}"].reshape(3, -1)):
            ours = np.asarray(result.cache.layer(i).positions[0, head])
            ours = set(ours[ours >= 0])
            theirs = set(rows[local]) | set(rows[-method.window_size :])
            assert len(ours) == len(theirs)
            wrong, total = wrong + len(ours - theirs), total + len(theirs)
    assert wrong <= REAL_SET_SHARE * total, f"{wrong} of {total} entries differ"
