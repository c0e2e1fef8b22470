"""The library against recorded runs of the published FastKV code: what is kept, the cache, logits and tokens.

All recordings with the same settings form one ragged batch of one bucket: few compilations, and padding is tried along.
"""

import json
from collections import defaultdict
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastkv_jax as fk
from examples import GOLDEN, arrays, filled, layers, model_a
from fastkv_jax.methods.base import Method
from tolerances import CACHE, FLOAT16, LOGITS

FOLDER = GOLDEN / "reference" / "cases"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))
# "max-native" twins break ties as torch on a CPU happens to, "max-stable" ones by the lowest index, as we do.
STABLE = [name for name in CASES if "native" not in name]
NATIVE = [name for name in CASES if "native" in name]
BUCKET = 384
STEPS = 17


class Row(NamedTuple):
    """What the library makes of one prompt: numpy arrays, one per layer in the lists."""

    logits: np.ndarray  # [V]
    kept: list[np.ndarray]  # [K, C] positions
    k: list[np.ndarray]  # [K, C, D]
    v: list[np.ndarray]
    propagated: np.ndarray | None  # [S] positions
    tokens: np.ndarray  # [STEPS]


@cache
def case(name: str) -> dict[str, np.ndarray]:
    return arrays(FOLDER / f"{name}.npz")


@cache
def method_of(name: str) -> Method:
    meta = json.loads(str(case(name)["meta"]))
    published = meta["method"].removesuffix("_fp16cast").replace("fullkv", "full")
    if published == "full":
        return fk.FullKV()
    if published == "pyramidinfer":
        given = meta["pyramidinfer_config"]["prefill_stage"]
        return fk.PyramidInfer.reference(
            recent_ratio=given["recent_ratio"],
            decay_ratio=given["prefill_decay_ratio"],
            distance_weight=given["distance_weight"],
            sinks=given["streamingllm_sink_len"],
            min_context=given["min_context_length"],
        )
    proportional = meta["eviction_mode"] == "proportional"
    settings = {"retention_rate": meta["retain_rate"]} if proportional else {"capacity": meta["max_capacity_prompts"]}
    if published == "gemfilter":
        settings |= {"filter_layer": meta["filter_idx"]}
    if published in ("h2o", "snapkv", "fastkv"):
        settings |= {"window_size": meta["window_size"]}
    if published in ("snapkv", "fastkv"):
        settings |= {"kernel_size": meta["kernel_size"], "pooling": meta["pooling"].removesuffix("pool")}
    if published == "fastkv":
        settings |= {"tsp_layer": meta["tsp_idx"]}
        settings |= {"tsp_rate": meta["tsp_rate"]} if proportional else {"tsp_length": meta["tsp_len"]}
    return fk.METHODS[published].reference(**settings)


@cache
def rows_by_method() -> dict[Method, list[tuple[str, int]]]:
    rows = defaultdict(list)
    for name in CASES:
        rows[method_of(name)] += [(name, row) for row in range(len(case(name)["input_ids"]))]
    return dict(rows)


@cache
def run(method: Method) -> dict[tuple[str, int], Row]:
    """Every recorded prompt of these settings, by case and row."""
    names = rows_by_method()[method]
    tokens, start = fk.pad_batch([case(name)["input_ids"][row] for name, row in names], BUCKET)
    options: dict[str, Any] = {"method": method, "max_new_tokens": STEPS}
    prompt = fk.prefill(model_a(), tokens, start, **options)
    made = np.asarray(fk.generate(model_a(), tokens, start, stop_tokens=(), **options).tokens)
    entries = layers(prompt.cache)
    result = {}
    for b, key in enumerate(names):
        kept = [filled(positions[b]) for _, _, positions in entries]
        k, v = ([layer[which][b, :, -kept[i].shape[1] :] for i, layer in enumerate(entries)] for which in (0, 1))
        propagated = None if prompt.propagated is None else filled(prompt.propagated[b][None])[0]
        result[key] = Row(np.asarray(prompt.logits[b]), kept, k, v, propagated, made[b])
    return result


def rows_of(name: str) -> list[Row]:
    return [run(method_of(name))[name, row] for row in range(len(case(name)["input_ids"]))]


def positions_kept(name: str, b: int, layer: int, heads: int) -> np.ndarray:
    """[N, C] as recorded, in the order of the recorded entries."""
    recorded = case(name)
    if f"kept_pos_{layer}" in recorded:
        return recorded[f"kept_pos_{layer}"][b]
    if f"layer_pos_{layer}" in recorded:  # PyramidInfer: a layer keeps what enters it
        return np.tile(recorded[f"layer_pos_{layer}"][b], (heads, 1))
    everything = np.arange(recorded["input_ids"].shape[1])
    return np.tile(recorded.get("gem_positions", everything), (heads, 1))


@pytest.mark.parametrize("name", STABLE)
def test_keeps_the_entries_the_published_code_keeps(name: str):
    recorded = case(name)
    tolerance = FLOAT16 if "fp16cast" in name else CACHE
    for b, ours in enumerate(rows_of(name)):
        for i, kept in enumerate(ours.kept):
            positions = positions_kept(name, b, i, len(kept))
            order = np.argsort(positions, axis=-1)  # the recording is in the order of the scores
            np.testing.assert_array_equal(kept, np.take_along_axis(positions, order, axis=-1))
            if f"k_{i}" not in recorded:  # stored for some cases of each method
                continue
            for key, cached in ((f"k_{i}", ours.k[i]), (f"v_{i}", ours.v[i])):
                theirs = np.take_along_axis(recorded[key][b], order[..., None], axis=1)
                np.testing.assert_allclose(cached, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in STABLE if "_fastkv" in name or "_gemfilter" in name])
def test_propagates_the_rows_the_published_code_propagates(name: str):
    recorded = case(name)
    for b, ours in enumerate(rows_of(name)):
        everything = np.arange(recorded["input_ids"].shape[1])
        theirs = recorded["tsp_idx"][b] if "tsp_idx" in recorded else recorded.get("gem_positions", everything)
        np.testing.assert_array_equal(ours.propagated, theirs)


@pytest.mark.parametrize("name", STABLE)
def test_logits_and_greedy_tokens_are_the_published_ones(name: str):
    recorded = case(name)
    tolerance = FLOAT16 if "fp16cast" in name else LOGITS
    for b, ours in enumerate(rows_of(name)):
        np.testing.assert_allclose(ours.logits, recorded["prefill_logits"][b], rtol=0, atol=tolerance)
        if "pyramidinfer" in name:  # its decoding evicts further
            continue
        # GemFilter has the benchmark's loop alone, whose positions are right for its renumbered rows.
        assert ours.tokens.tolist() == recorded["e2e_tokens" if "gemfilter" in name else "gen_tokens"][b].tolist()
        if "fullkv" in name:  # nothing evicted: the benchmark loop's positions are the true ones too
            assert ours.tokens.tolist() == recorded["e2e_tokens"][b].tolist()


@pytest.mark.parametrize("name", NATIVE)
def test_where_ties_are_broken_otherwise_the_chosen_scores_are_the_same(name: str):
    recorded, ours = case(name), rows_of(name)[0]
    method = method_of(name)
    window, propagates = method.window_size, "tsp_idx" in recorded
    tsp_layer = method.tsp_layer if propagates else len(ours.kept)

    def assert_same_scores(scores: np.ndarray, theirs: np.ndarray, mine: np.ndarray) -> None:
        np.testing.assert_array_equal(*(np.sort(np.take(scores, chosen)) for chosen in (theirs, mine)))

    same_rows = True
    if propagates:
        assert_same_scores(recorded["tsp_scores"][0], recorded["tsp_sel_idx"][0], ours.propagated[:-window])
        same_rows = np.array_equal(ours.propagated, recorded["tsp_idx"][0])
    for i, kept in enumerate(ours.kept):
        if i <= tsp_layer:
            entering = np.arange(recorded["input_ids"].shape[1])
        elif same_rows:
            entering = recorded["tsp_idx"][0]
        else:
            continue  # other rows than ours entered: these scores are not about ours
        for head, positions in enumerate(kept[:, :-window]):
            local = np.searchsorted(entering, positions)
            assert_same_scores(recorded[f"scores_{i}"][0, head], recorded[f"sel_idx_{i}"][0, head], local)


def test_the_recordings_are_all_here():
    assert len(CASES) == 64 and len(NATIVE) == 4
    counts = {method: sum(f"_{method}_" in name for name in CASES) for method in ("fullkv", "fastkv", "h2o", "snapkv")}
    assert counts == {"fullkv": 4, "fastkv": 23, "h2o": 7, "snapkv": 16}
    assert sum(any(f"k_{i}" in case(name) for i in range(4)) for name in CASES) > 10
