"""What every method promises, whatever its name."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkv_jax as fk
from examples import EXAMPLES, LENGTHS, METHOD_IDS, METHODS, TAILS, filled, filled_by_head, layers, ragged
from fastkv_jax.methods.base import Layer, Method, Segment
from fastkv_jax.methods.plan import check_plan, effective_budgets
from fastkv_jax.prefilling.adaptive import Adaptive

LAYERS = 4
N = np.arange(1, 4098)
every_method = pytest.mark.parametrize("method", METHODS, ids=METHOD_IDS)


def test_every_registered_method_has_examples_of_its_type():
    assert list(EXAMPLES) == list(fk.METHODS)
    for name, examples in EXAMPLES.items():
        assert examples and all(type(method) is fk.METHODS[name] for method in examples)


@every_method
def test_a_method_is_a_frozen_value_that_jit_can_take_as_static(method: Method):
    assert dataclasses.is_dataclass(method)
    copy = dataclasses.replace(method)
    assert copy == method and hash(copy) == hash(method)
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)


def last_pass(method: Method) -> list[Segment]:
    """The segments whose entries stay: all, unless the prompt is read again."""
    plan = check_plan(method.plan(N, LAYERS), LAYERS)
    return list(plan[max(i for i, segment in enumerate(plan) if segment.first == 0) :])


@every_method
def test_the_plan_covers_each_layer_once(method: Method):
    layers = [layer for segment in last_pass(method) for layer in range(segment.first, segment.stop)]
    assert layers == list(range(LAYERS))


@every_method
def test_no_run_keeps_more_than_enters_it_and_none_grows(method: Method):
    entering = N
    for segment in last_pass(method):
        assert segment.tokens.shape == segment.kept.shape == N.shape
        assert (segment.tokens <= entering).all()
        assert (segment.kept <= segment.tokens).all()
        assert (segment.kept >= np.minimum(segment.tokens, method.window(N))).all()
        assert (segment.kept > 0).all()
        entering = segment.tokens


def has_a_plain_budget(method: Method) -> bool:
    """A share of the prompt, of which no layer drops rows; those that do have tests of their own (test_fastkv.py)."""
    fields = {field.name for field in dataclasses.fields(method)}
    return getattr(method, "retention_rate", None) is not None and not fields & {"tsp_layer", "tsp_rate"}


PLAIN = {name: method for name, method in zip(METHOD_IDS, METHODS, strict=True) if has_a_plain_budget(method)}


def test_most_methods_have_a_plain_budget():
    assert {name.split("-")[0] for name in PLAIN} == set(fk.METHODS) - {"full", "fastkv", "pyramidinfer", "claa", "asl"}


@pytest.mark.parametrize("method", PLAIN.values(), ids=list(PLAIN))
@given(n=st.integers(1, 4097), rate=st.floats(0.01, 1.0) | st.sampled_from([0.1, 0.2, 0.3, 0.6, 0.7]))
@settings(max_examples=40, deadline=None)
def test_budgets_are_the_truncated_rate_of_the_true_length(method: Method, n: int, rate: float):
    """The mean over the layers where they differ; the window, and a cap by the rows there are, come on top."""
    built = dataclasses.replace(method, retention_rate=rate)
    least = max(int(built.window(np.array([n]))[0]), built.sinks + 1 if isinstance(built, fk.StreamingLLM) else 1)
    budget = min(n, max(least, int(n * rate)))
    kept = [int(s.kept[0]) for s in built.plan(np.array([n]), LAYERS) for _ in range(s.first, s.stop) if s.kept[0]]
    assert len(kept) == LAYERS
    if isinstance(method, fk.PyramidKV):
        assert kept == sorted(kept, reverse=True) and LAYERS * budget - LAYERS < sum(kept) <= LAYERS * budget
    else:
        assert set(kept) == {budget}


@every_method
def test_the_plan_of_many_lengths_is_that_of_each(method: Method):
    many = method.plan(N, LAYERS)
    for n in (1, 7, 8, 9, 100, 1023, 4097):
        for segment, alone in zip(many, method.plan(np.array([n]), LAYERS), strict=True):
            assert (segment.first, segment.stop) == (alone.first, alone.stop)
            assert segment.tokens[n - 1] == alone.tokens[0] and segment.kept[n - 1] == alone.kept[0]


@pytest.mark.parametrize("tails", [0, TAILS], ids=["no tail", "a tail for each row"])
@every_method
def test_the_window_and_what_follows_it_are_always_kept(method: Method, tails: tuple[int, ...] | int):
    result = ragged(method, tails)
    entries = layers(result.cache)
    for row, (n, tail) in enumerate(zip(LENGTHS, np.broadcast_to(tails, len(LENGTHS)), strict=True)):
        window = int(method.window(np.array([n]))[0])
        last = np.arange(max(0, n - window - tail) if window else n, n)
        kept = [head for i in range(LAYERS) for head in filled_by_head(entries[i].positions[row])]
        kept += [] if result.propagated is None else filled_by_head(result.propagated[row][None])
        for positions in kept:
            assert (positions[len(positions) - len(last) :] == last).all()
            assert (np.diff(positions) > 0).all() and (positions >= 0).all() and (positions < n).all()


@pytest.mark.parametrize("tails", [0, TAILS], ids=["no tail", "a tail for each row"])
@every_method
def test_effective_budgets_are_what_prefill_really_keeps(method: Method, tails: tuple[int, ...] | int):
    result = ragged(method, tails)
    entries = layers(result.cache)
    for row, (n, tail) in enumerate(zip(LENGTHS, np.broadcast_to(tails, len(LENGTHS)), strict=True)):
        runs = effective_budgets(method, n, int(tail), LAYERS)
        assert [layer for run in runs for layer in range(run.first, run.last + 1)] == list(range(LAYERS))
        for run in runs:
            for layer in range(run.first, run.last + 1):
                heads = filled_by_head(entries[layer].positions[row])
                assert sum(map(len, heads)) == len(heads) * run.kept
        if result.propagated is not None:
            allowed = {runs[-1].tokens}
            if isinstance(method, Adaptive):  # the plan is without TSP, which may come or not
                allowed = {n, effective_budgets(method.at(0), n, int(tail), LAYERS)[-1].tokens}
            assert filled(result.propagated[row][None]).shape[1] in allowed


@every_method
def test_scores_have_a_value_for_every_row_and_cache_head(method: Method):
    scores = method.scores(ones())
    assert scores.tokens.shape == (2, 16)
    assert scores.kv.shape in ((2, 2, 16), (2, 4, 16))
    assert scores.tokens.dtype == scores.kv.dtype == np.float32
    for values in scores:
        assert not np.isnan(ones().protect(values)).any()


def ones() -> Layer:
    q, k, v = (jax.numpy.ones((2, heads, 16, 4)) for heads in (4, 2, 2))
    start = jax.numpy.array([0, 3])
    columns = jax.numpy.arange(16)[None] - start[:, None]
    return Layer(
        q, k, v, jax.numpy.maximum(columns, -1), start, stop=jax.numpy.array([16, 15]), window=jax.numpy.array([4, 4]),
        kept=jax.numpy.array([8, 7]), frequencies=jax.numpy.array([1.0, 0.1]), wo=jax.numpy.ones((8, 16)),
    )  # fmt: skip


def test_gemfilter_as_published_chooses_the_bare_share():
    n = np.array([1, 40, 79, 96])
    plan = fk.GemFilter.reference(filter_layer=1, retention_rate=0.1).plan(n, LAYERS)
    assert plan[-1].tokens.tolist() == [1, 4, 7, 9]
    ours = fk.GemFilter(filter_layer=1, retention_rate=0.1, window_size=8).plan(n, LAYERS)
    assert ours[-1].tokens.tolist() == [1, 8, 8, 9]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(0, 2, N, N)], r"plan covers layers \[0, 2\], not 0..4"),
        ([Segment(0, 2, N, N), Segment(3, 4, N, N)], "plan covers layers"),
        ([Segment(1, 4, N, N)], "plan covers layers"),
        ([Segment(0, 4, N, N + 1)], "plan of layers 0..3: budgets exceed the tokens"),
        ([Segment(0, 2, N - 1, N - 1), Segment(2, 4, N, N)], "plan of layers 2..3: budgets exceed the tokens"),
        ([Segment(0, 4, N, N - 2)], "budgets exceed"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(segments: list[Segment], message: str):
    with pytest.raises(fk.FastKVConfigError, match=message):
        check_plan(segments, LAYERS)
