"""The oracle against recorded runs: the published FastKV code, and transformers' models. Needs NumPy only."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from oracle import OracleResult, oracle_forward, oracle_generate

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = GOLDEN / "reference"
TRANSFORMERS = GOLDEN / "transformers"
# "max-native" twins break ties as torch on a CPU happens to; "max-stable" ones by the lowest index, as the oracle does.
FULL_CASES = sorted(p.stem for p in (REFERENCE / "cases").glob("A_fullkv_*.npz"))
FASTKV_CASES = sorted(p.stem for p in (REFERENCE / "cases").glob("A_fastkv_*.npz") if "native" not in p.stem)
CASES = FULL_CASES + FASTKV_CASES
MODELS = sorted(p.stem for p in TRANSFORMERS.glob("*.npz"))
LOGITS = 1e-4
CACHE = 2e-4
SETTINGS = {"tsp_layer": 1, "window_size": 8, "kernel_size": 5, "pooling": "max"}


@cache
def checkpoint(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    weights = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    return weights, json.loads((folder / "config.json").read_text())


def model_a() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return checkpoint(REFERENCE / "models" / "A")


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return dict(data)


def method_of(meta: dict[str, Any], reference: bool) -> Any:
    if meta["method"] == "fullkv":
        return "full"
    by_rate = meta["eviction_mode"] == "proportional"
    budgets = ("retain_rate", "tsp_rate") if by_rate else ("max_capacity_prompts", "tsp_len")
    names = ("retention_rate", "tsp_rate") if by_rate else ("capacity", "tsp_length")
    return {
        **{name: meta[budget] for name, budget in zip(names, budgets, strict=True)},
        "tsp_layer": meta["tsp_idx"],
        "window_size": meta["window_size"],
        "kernel_size": meta["kernel_size"],
        "pooling": meta["pooling"].removesuffix("pool"),
        "reference": reference,
    }


def assert_cache_equal(result: OracleResult, case: dict[str, np.ndarray], row: int) -> None:
    """The same entries in every layer and head; the recording holds them in the order of their scores."""
    for i, kept in enumerate(result.kept):
        if f"k_{i}" not in case:  # the larger recordings of the full cache
            continue
        recorded = case.get(f"kept_pos_{i}")
        recorded = np.broadcast_to(np.arange(kept.shape[1]), kept.shape) if recorded is None else recorded[row]
        order = np.argsort(recorded, axis=-1)
        np.testing.assert_array_equal(kept, np.take_along_axis(recorded, order, axis=-1))
        for name, ours in (("k", result.k[i]), ("v", result.v[i])):
            theirs = np.take_along_axis(case[f"{name}_{i}"][row], order[..., None], axis=1)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=CACHE)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_published_code(name: str):
    case = arrays(REFERENCE / "cases" / f"{name}.npz")
    method = method_of(json.loads(str(case["meta"])), reference=True)
    for row, tokens in enumerate(case["input_ids"]):
        result = oracle_forward(*model_a(), tokens, method=method)
        np.testing.assert_allclose(result.logits, case["prefill_logits"][row], rtol=0, atol=LOGITS)
        assert_cache_equal(result, case, row)
        if "tsp_idx" in case:
            np.testing.assert_array_equal(result.propagated, case["tsp_idx"][row])
        else:
            assert result.propagated is None


@pytest.mark.parametrize("name", CASES)
def test_decodes_as_the_published_code(name: str):
    case = arrays(REFERENCE / "cases" / f"{name}.npz")
    method = method_of(json.loads(str(case["meta"])), reference=True)
    for row, prompt in enumerate(case["input_ids"]):
        tokens, logits = oracle_generate(*model_a(), prompt, case["gen_tokens"].shape[1], method=method)
        assert tokens == case["gen_tokens"][row].tolist()
        if "gen_logits" in case:  # recorded with the shorter prompts
            np.testing.assert_allclose(logits, case["gen_logits"][:, row], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("name", FASTKV_CASES)
def test_default_budgets_agree_where_the_published_code_runs(name: str):
    case = arrays(REFERENCE / "cases" / f"{name}.npz")
    method = method_of(json.loads(str(case["meta"])), reference=False)
    for row, tokens in enumerate(case["input_ids"]):
        result = oracle_forward(*model_a(), tokens, method=method)
        np.testing.assert_allclose(result.logits, case["prefill_logits"][row], rtol=0, atol=LOGITS)
        assert_cache_equal(result, case, row)
        everything = np.arange(len(tokens))
        np.testing.assert_array_equal(result.propagated, case["tsp_idx"][row] if "tsp_idx" in case else everything)


@pytest.mark.parametrize("length", [3, 65, 301])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_transformers(name: str, length: int):
    data = arrays(TRANSFORMERS / f"{name}.npz")
    prompt, tokens = data[f"input_ids_{length}"], data[f"tokens_{length}"]
    ours, logits = oracle_generate(*checkpoint(TRANSFORMERS / name), prompt, len(tokens), method="full")
    np.testing.assert_allclose(logits[0], data[f"logits_{length}"], rtol=0, atol=LOGITS)
    assert ours == tokens.tolist()


def test_reads_both_spellings_of_the_rotary_settings():
    folder = TRANSFORMERS / "llama3_rope"
    weights, config = checkpoint(folder)
    old = json.loads((folder / "config_v4.json").read_text())
    new_logits, old_logits = (oracle_forward(weights, c, range(90), method="full").logits for c in (config, old))
    np.testing.assert_array_equal(old_logits, new_logits)


@pytest.mark.parametrize("window_end", [0, 5])
@pytest.mark.parametrize(
    ("budget", "n", "expected"),
    [  # expected: (kept up to the TSP layer, propagated, kept after it), none of them below the window and its end
        ({"tsp_rate": 0.4, "retention_rate": 0.2}, 96, (19, 38, 19)),
        ({"tsp_rate": 0.4, "retention_rate": 0.3}, 101, (30, 40, 29)),
        ({"tsp_rate": 0.2, "retention_rate": 0.5}, 96, (48, 19, 19)),
        ({"tsp_rate": 0.05, "retention_rate": 0.01}, 96, (0, 0, 0)),
        ({"tsp_length": 40, "retention_rate": 0.3}, 96, (28, 40, 28)),
        ({"tsp_length": 20, "capacity": 50}, 96, (50, 20, 20)),
        ({"tsp_rate": 0.5, "capacity": 30}, 96, (30, 48, 30)),
        ({"tsp_length": 500, "capacity": 700}, 96, (96, 96, 96)),
        ({"tsp_rate": 0.2, "retention_rate": 0.1}, 6, (6, 6, 6)),
    ],
)
def test_default_budgets(budget: dict[str, Any], n: int, expected: tuple[int, int, int], window_end: int):
    tail = min(n, SETTINGS["window_size"] + window_end)
    tokens = np.random.default_rng(0).integers(0, 128, n)
    result = oracle_forward(*model_a(), tokens, method=SETTINGS | budget, window_end=window_end)
    assert result.propagated is not None
    before, rows, after = (max(tail, count) for count in expected)
    assert [kept.shape[1] for kept in result.kept] == [before, before, after, after]
    assert len(result.propagated) == rows
    for kept in [*result.kept, result.propagated[None]]:
        assert (np.diff(kept) > 0).all()
        np.testing.assert_array_equal(kept[:, -tail:], np.broadcast_to(np.arange(n - tail, n), (len(kept), tail)))


def test_rows_after_the_window_do_not_score():
    tokens = np.random.default_rng(1).integers(0, 128, 120)
    method = SETTINGS | {"tsp_rate": 0.5, "retention_rate": 0.25}
    changed = np.concatenate([tokens[:-6], (tokens[-6:] + 1) % 128])
    ours, theirs = (oracle_forward(*model_a(), t, method=method, window_end=6) for t in (tokens, changed))
    for i in (0, 1):
        np.testing.assert_array_equal(ours.kept[i], theirs.kept[i])
    np.testing.assert_array_equal(ours.propagated, theirs.propagated)
    assert np.abs(ours.logits - theirs.logits).max() > 0.1


def test_the_published_code_propagates_all_of_a_prompt_below_its_capacity():
    method = SETTINGS | {"tsp_length": 20, "capacity": 96, "reference": True}
    result = oracle_forward(*model_a(), range(70), method=method)
    assert [kept.shape[1] for kept in result.kept] == [70, 70, 70, 70]
    assert result.propagated is None


def test_the_published_code_truncates_twice():
    method = SETTINGS | {"tsp_rate": 0.4, "retention_rate": 0.3, "reference": True}
    result = oracle_forward(*model_a(), range(101), method=method)
    assert [kept.shape[1] for kept in result.kept] == [30, 30, 29, 29]  # 40 * (0.3 / 0.4) is just below 30


def test_the_published_code_has_no_answer_below_the_window():
    method = SETTINGS | {"tsp_rate": 0.2, "retention_rate": 0.1, "reference": True}
    with pytest.raises(ValueError, match="window"):
        oracle_forward(*model_a(), range(70), method=method)
