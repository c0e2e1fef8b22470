"""What every method promises, whatever its name."""

import dataclasses

import jax
import numpy as np
import pytest

import fastkv_jax as fk
from examples import EXAMPLES, LENGTHS, METHOD_IDS, METHODS, TAILS, filled, ragged
from fastkv_jax.methods.base import Method, Rows, Segment, check_plan, effective_budgets

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


@every_method
def test_the_plan_covers_each_layer_once(method: Method):
    layers = [layer for segment in method.plan(N, LAYERS) for layer in range(segment.first, segment.stop)]
    assert layers == list(range(LAYERS))


@every_method
def test_no_run_keeps_more_than_enters_it_and_none_grows(method: Method):
    entering = N
    for segment in method.plan(N, LAYERS):
        assert segment.tokens.shape == segment.kept.shape == N.shape
        assert (segment.tokens <= entering).all()
        assert (segment.kept <= segment.tokens).all()
        assert (segment.kept >= np.minimum(N, method.window_size)).all()
        assert (segment.kept > 0).all()
        entering = segment.tokens


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
    for row, (n, tail) in enumerate(zip(LENGTHS, np.broadcast_to(tails, len(LENGTHS)), strict=True)):
        last = np.arange(max(0, n - method.window_size - tail), n)
        kept = [filled(result.cache.layer(i).positions[row]) for i in range(LAYERS)]
        kept += [] if result.propagated is None else [filled(result.propagated[row][None])]
        for positions in kept:
            assert (positions[:, positions.shape[1] - len(last) :] == last).all()
            assert (np.diff(positions, axis=1) > 0).all() and (positions >= 0).all() and (positions < n).all()


@pytest.mark.parametrize("tails", [0, TAILS], ids=["no tail", "a tail for each row"])
@every_method
def test_effective_budgets_are_what_prefill_really_keeps(method: Method, tails: tuple[int, ...] | int):
    result = ragged(method, tails)
    for row, (n, tail) in enumerate(zip(LENGTHS, np.broadcast_to(tails, len(LENGTHS)), strict=True)):
        runs = effective_budgets(method, n, int(tail), LAYERS)
        assert [layer for run in runs for layer in range(run.first, run.last + 1)] == list(range(LAYERS))
        for run in runs:
            for layer in range(run.first, run.last + 1):
                assert filled(result.cache.layer(layer).positions[row]).shape[1] == run.kept
        if result.propagated is not None:
            assert filled(result.propagated[row][None]).shape[1] == runs[-1].tokens


@every_method
def test_scores_have_a_value_for_every_row_and_cache_head(method: Method):
    q, k, v = (jax.numpy.ones((2, heads, 16, 4)) for heads in (4, 2, 2))
    positions = jax.numpy.broadcast_to(jax.numpy.arange(16), (2, 16))
    rows = Rows(positions, jax.numpy.array([0, 3]), jax.numpy.array([16, 15]))
    scores = method.scores(q, k, v, rows)
    assert scores.tokens.shape == (2, 16)
    assert scores.kv.shape in ((2, 2, 16), (2, 4, 16))
    assert not np.isnan(scores.tokens).any() and not np.isnan(scores.kv).any()


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
