"""What the table of methods is made of: answers, shares, likelihoods, costs."""

import numpy as np
import pytest

import fastkv_jax as fk
from examples import BUCKET, EXAMPLES, PROMPTS, model_a
from fastkv_jax.evals.compare import Question, Row, _caches, compare, methods_at


@pytest.fixture(scope="module")
def rows():
    rows = [Row("full", fk.FullKV()), *(Row(name, method) for name, method in methods_at(0.3, 4))]
    random = np.random.default_rng(0)
    prompt = random.integers(0, 128, 120).tolist()
    made = fk.generate(model_a(), [prompt], method=fk.FullKV(), max_new_tokens=4, stop_tokens=())
    question = Question(prompt, 0, np.asarray(made.tokens)[0].tolist(), np.arange(40, 50))
    wrong = question._replace(answer=[(t + 1) % 128 for t in question.answer])
    compare(model_a(), rows, {"right": [question], "wrong": [wrong]}, [random.integers(0, 128, 100).tolist()], 128)
    return {row.name: row for row in rows}


@pytest.mark.parametrize("method", [fk.FullKV(), EXAMPLES["fastkv"][0]], ids=["full", "fastkv"])
def test_entries_of_8_bits_are_those_of_prefill(method):
    row = Row("", method, "int8")
    ((_, cache), (_, whole)) = _caches(model_a(), [row, Row("", method)], PROMPTS[4].tolist(), 0, BUCKET)
    tokens, start = fk.pad_batch([PROMPTS[4]], BUCKET)
    theirs = fk.prefill(model_a(), tokens, start, method=method, max_new_tokens=0, kv_dtype="int8").cache
    for mine, other in zip(cache.segments, theirs.segments, strict=True):
        for name in ("k", "v", "k_scale", "v_scale", "positions"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
    dim = model_a().config.head_dim
    assert (cache.entry_bytes() * 4 * dim == whole.entry_bytes() * (dim + 2)).all()


def test_full_context_says_what_it_says_and_keeps_all(rows):
    full = rows["full"]
    assert full.right == {"right": [True], "wrong": [False]}
    assert full.kept == full.flops == full.bytes == [1.0, 1.0]
    cache = fk.prefill(model_a(), *fk.pad_batch(PROMPTS[3:4]), method=fk.FullKV(), max_new_tokens=0).cache
    assert cache.position == 80


def test_every_method_has_its_costs(rows):
    assert set(rows) == {"full", *fk.METHODS} - {"pyramidinfer"}
    for name, row in rows.items():
        if name != "full":
            assert len(row.nll) == 1 and np.isfinite(row.nll[0])
            assert 0 <= row.kept[0] < 1 and row.flops[0] <= (1.5 if name == "gemfilter" else 1.0)
            assert row.bytes[0] < (0.7 if name == "claa" else 0.35)
    assert rows["fastkv"].flops[0] < 0.8 < rows["snapkv"].flops[0] == 1.0
    # a flat cache holds as many entries as an even one
    assert rows["adakv"].bytes == rows["snapkv"].bytes
