"""One pass for many methods is the prefill of each."""

import jax
import numpy as np
import pytest

import fastkv_jax as fk
from examples import BUCKET, EXAMPLES, MODEL_A, PROMPTS, layers, model_a, ragged
from fastkv_jax.prefilling.many_methods import in_one_pass, prefill_all

DROP_TOKENS = ("fastkv", "gemfilter", "pyramidinfer", "claa", "asl")
ALONE = [method for name, examples in EXAMPLES.items() for method in examples if name not in DROP_TOKENS]


def test_one_pass_leaves_what_each_method_leaves():
    together = prefill_all(model_a(), *fk.pad_batch(PROMPTS, BUCKET), methods=ALONE, max_new_tokens=3)
    for method, mine in zip(ALONE, together, strict=True):
        theirs = ragged(method)
        np.testing.assert_allclose(mine.logits, theirs.logits, rtol=1e-5, atol=1e-5)
        assert mine.cache.max_new_tokens == 3
        for one_layer, other_layer in zip(layers(mine.cache), layers(theirs.cache), strict=True):
            heads = (a.positions.reshape(-1, a.positions.shape[-1]) for a in (one_layer, other_layer))
            for one, two in zip(*heads, strict=True):
                assert one[one >= 0].tolist() == two[two >= 0].tolist()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_entries_of_8_bits(dtype: str):
    tokens, start = fk.pad_batch(PROMPTS, BUCKET)
    together = prefill_all(model_a(), tokens, start, methods=ALONE[:4], max_new_tokens=3, kv_dtype=dtype)
    for method, mine in zip(ALONE[:4], together, strict=True):
        theirs = fk.prefill(model_a(), tokens, start, method=method, max_new_tokens=3, kv_dtype=dtype)
        for one, two in zip(mine.cache.segments, theirs.cache.segments, strict=True):
            assert one.k.dtype == one.v.dtype == two.k.dtype == dtype
            np.testing.assert_array_equal(one.positions, two.positions)
            for name in ("k", "v"):
                scales = [np.asarray(getattr(a, f"{name}_scale"), np.float32) for a in (one, two)]
                np.testing.assert_allclose(*scales, rtol=0.01)
                values = [np.asarray(getattr(a, name), np.float32) for a in (one, two)]
                assert (values[0] == values[1]).mean() > 0.99


@pytest.mark.parametrize("axes", [{"data": 2, "model": 2}, {"sequence": 4}])
def test_on_a_mesh(axes: dict[str, int]):
    count = int(np.prod(list(axes.values())))
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:count])
    model = fk.load_model(MODEL_A, dtype="float32", mesh=mesh)
    together = prefill_all(model, *fk.pad_batch(PROMPTS, BUCKET), methods=ALONE[:6], max_new_tokens=3)
    for method, mine in zip(ALONE[:6], together, strict=True):
        theirs = ragged(method)
        np.testing.assert_allclose(mine.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        for one, two in zip(layers(mine.cache), layers(theirs.cache), strict=True):
            np.testing.assert_array_equal(one.positions >= 0, two.positions >= 0)
            np.testing.assert_array_equal(one.positions, two.positions)


def test_rows_may_end_their_question_apart():
    ends, method = np.array([0, 5, 3, 1, 0][: len(PROMPTS)] + [0] * (len(PROMPTS) - 5)), ALONE[-1]
    tokens, start = fk.pad_batch(PROMPTS, BUCKET)
    (mine,) = prefill_all(model_a(), tokens, start, methods=[method], max_new_tokens=0, window_end=ends)
    theirs = fk.prefill(model_a(), tokens, start, method=method, max_new_tokens=0, window_end=ends)
    for one, two in zip(layers(mine.cache), layers(theirs.cache), strict=True):
        np.testing.assert_array_equal(one.positions, two.positions)


def test_which_methods_let_every_token_through_every_layer():
    assert not in_one_pass(fk.FastKV(tsp_layer=14), 30) and not in_one_pass(fk.CLAA(tsp_layer=28), 30)
    assert in_one_pass(fk.AdaKV(), 30) and in_one_pass(fk.FullKV(), 30) and not in_one_pass(fk.ASL(), 30)


@pytest.mark.parametrize(("kind", "shared"), [(fk.H2O, True), (fk.TOVA, True), (fk.AdaKV, False)])
def test_methods_that_differ_in_their_budgets_alone_share_their_scores(kind, shared: bool, monkeypatch):
    called, scores = [], kind.scores
    monkeypatch.setattr(kind, "scores", lambda self, layer: called.append(self) or scores(self, layer))
    methods = [kind(retention_rate=rate, window_size=3) for rate in (0.11, 0.23, 0.37)]
    prefill_all(model_a(), *fk.pad_batch(PROMPTS, BUCKET), methods=methods, max_new_tokens=2)
    assert set(called) == set(methods[:1] if shared else methods)
