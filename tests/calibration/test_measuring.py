"""Calibration: what it measures is what `prefill` and `generate` do."""

import dataclasses

import numpy as np
import pytest
from calibrated import ENDS, LAYERS, OTHER, PROMPTS, RATES, TRIED, fastkv, found, generated, one_setting, read, samples

import fastkv_jax as fk
from examples import layers, model_a
from fastkv_jax.calibration import survey
from fastkv_jax.calibration.rules import Setting, earliest_close
from fastkv_jax.calibration.samples import longest_run
from fastkv_jax.costs import layer_flops
from fastkv_jax.decoding import loop
from fastkv_jax.methods.plan import effective_budgets
from fastkv_jax.prefilling.layers import leave, propagate, run_layers
from tolerances import LOGITS


def spans() -> list[tuple[int, int, int]]:
    return [(i, *span) for i, span in enumerate(found().spans) if span is not None]


@pytest.mark.parametrize(("setting", "layer"), [(TRIED, 0), (TRIED, 2), (OTHER, 1)])
def test_the_share_let_through_is_what_prefill_propagates(setting: Setting, layer: int):
    shares = []
    for i, first, stop in spans():
        passed = np.asarray(read(i, fastkv(setting, layer)).propagated)
        shares.append(np.isin(np.arange(first, stop), passed).mean())
    assert found().propagated[found().settings.index(setting), layer] == pytest.approx(np.mean(shares), abs=1e-12)


def test_the_shares_let_through_differ_between_settings_and_layers():
    assert found().propagated.shape == (4, 4)
    assert all(len(np.unique(found().propagated, axis=axis)) > 1 for axis in (0, 1))
    assert 0 < found().propagated.mean() < 1


@pytest.mark.parametrize("setting", [TRIED, OTHER], ids=str)
def test_the_share_kept_is_what_each_layers_heads_keep_of_the_full_context(setting: Setting):
    alone = fk.SnapKV(retention_rate=RATES["retention_rate"], **setting._asdict())
    place = found().settings.index(setting)
    for layer in range(4):
        for method in (alone, fastkv(TRIED, 2)) if setting == TRIED and layer <= 2 else (alone,):
            heads = []
            for i, first, stop in spans():
                kept = layers(read(i, method).cache)[layer].positions[0]
                heads.append([np.isin(np.arange(first, stop), head).mean() for head in kept])
            assert found().kept_mean[place, layer] == pytest.approx(np.mean(heads), abs=1e-12)
            assert found().kept_best[place, layer] == pytest.approx(np.max(heads, axis=1).mean(), abs=1e-12)


def test_the_overlap_is_that_of_the_sets_prefill_propagates():
    shares = []
    for i, end in enumerate(ENDS):
        one, other = (set(np.asarray(read(i, fastkv(TRIED, layer)).propagated)[0].tolist()) for layer in (0, 2))
        fixed = set(range(len(PROMPTS[i]) - TRIED.window_size - end, len(PROMPTS[i]))) | {-1}
        shares.append(len((one & other) - fixed) / len(one - fixed))
    overlap = found().overlap[found().settings.index(TRIED)]
    assert overlap[0, 2] == overlap[2, 0] == pytest.approx(np.mean(shares), abs=1e-6)
    np.testing.assert_allclose(np.diag(overlap), 1)


def hidden(logits) -> np.ndarray:
    """The final hidden state that the head, which has more rows than columns, made these logits of."""
    head = model_a().lm_head
    assert head is not None
    return np.linalg.lstsq(np.asarray(head[...], np.float64), np.asarray(logits, np.float64)[0], rcond=None)[0]


@pytest.mark.parametrize("layer", [0, 2])
def test_the_distance_is_that_of_the_hidden_states_behind_prefills_logits(layer: int):
    distances = []
    for i in range(len(PROMPTS)):
        full, other = (hidden(read(i, method).logits) for method in (fk.FullKV(), fastkv(TRIED, layer)))
        distances.append(((full - other) ** 2).sum() / (full**2).sum())
    assert found().finalists == (TRIED,)
    assert found().distance[0, layer] == pytest.approx(np.mean(distances), abs=LOGITS) and np.mean(distances) > 0.01


def test_right_answers_are_those_that_generate_gives():
    def right(method):
        said = zip(samples(), (generated(i, method) for i in range(len(PROMPTS))), strict=True)
        return sum(longest_run(made, sample.answer)[1] == len(sample.answer) for sample, made in said)

    assert found().right_full == right(fk.FullKV()) == 1 and found().answers == 3
    assert [found().right[0, layer] for layer in (0, 2)] == [right(fastkv(TRIED, layer)) for layer in (0, 2)] == [1, 0]
    assert found().decided_by == "answers" and (found().tsp_layer, found().right_chosen) == (0, 1)


def test_with_all_tokens_the_distance_is_zero_at_every_layer():
    all_tokens = one_setting(samples(), tsp_rate=1.0)
    assert all_tokens.distance.shape == (1, 3) and all_tokens.distance.max() < 1e-10
    assert all_tokens.by_distance == 0 and all_tokens.flops_share == 1
    assert (all_tokens.propagated == 1).all() and all_tokens.kept_mean.mean() < 1


def test_candidate_layers_compile_nothing_of_their_own():
    def programs():
        every = run_layers, propagate, leave, survey._look, loop._decode_chunk
        return [program._cache_size() for program in every]

    one_setting(samples()[2:], (1,))
    before = programs()
    one_setting(samples()[2:], (0, 1, 2))
    assert programs() == before


def test_the_cost_is_counted_from_shapes():
    c = model_a().config
    shares = []
    for prompt, end in zip(PROMPTS, ENDS, strict=True):
        runs = effective_budgets(found().method(), len(prompt), end, 4)
        flops = sum((run.last - run.first + 1) * layer_flops(c, run.tokens) for run in runs)
        shares.append(flops / (4 * layer_flops(c, len(prompt))))
    assert found().flops_share == pytest.approx(np.mean(shares))


def test_the_prefill_is_timed_when_asked_for():
    assert found().seconds is None
    timed = one_setting(samples()[2:], [1], timed=True)
    assert timed.seconds is not None and all(0 < s < 60 for s in timed.seconds)


def test_without_right_answers_the_distance_decides():
    other = int(next(t for t in range(128) if t not in generated(2, fk.FullKV())))
    lost = dataclasses.replace(samples()[2], answer=(other,) * 3)
    for sample in (lost, dataclasses.replace(lost, answer=())):
        one = one_setting([sample])
        assert one.decided_by == "distance" and one.right_full == 0 and one.answers == bool(sample.answer)
        assert one.tsp_layer == one.by_distance == earliest_close(LAYERS, one.distance[0], 0.1)
