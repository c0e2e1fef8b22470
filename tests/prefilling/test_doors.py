"""Prefill: what it returns, against the oracle and against itself by other routes."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastkv_jax as fk
from compilations import compilations
from examples import (
    BUCKET,
    EXAMPLES,
    IN_ORACLE,
    LENGTHS,
    METHOD_IDS,
    METHODS,
    MODEL_A,
    NEW,
    PROMPTS,
    TAILS,
    batch,
    filled,
    filled_by_head,
    greedy,
    layers,
    model_a,
    oracle_settings,
    ragged,
)
from examples import weights_a as oracle_model
from fastkv_jax.methods.base import Method
from fastkv_jax.methods.plan import layers_run
from fastkv_jax.prefilling.adaptive import Adaptive
from fastkv_jax.prefilling.doors import Prefill, PrefillOptions, prepare
from oracle import oracle_forward
from tolerances import CACHE, LOGITS, LOGITS_BF16, SAME

LAYERS = 4
WIDER = BUCKET + 128  # of prompts alone: one program for all tests
FASTKV = METHODS[1]
all_methods = pytest.mark.parametrize("method", METHODS, ids=METHOD_IDS)
in_the_oracle = pytest.mark.parametrize("method", IN_ORACLE, ids=["full", "fastkv-0", "fastkv-1", "fastkv-2"])
one_of_each = pytest.mark.parametrize("method", [examples[0] for examples in EXAMPLES.values()], ids=list(EXAMPLES))
that_can_be_traced = pytest.mark.parametrize(
    "method",
    [examples[0] for name, examples in EXAMPLES.items() if name != "asl"],
    ids=[n for n in EXAMPLES if n != "asl"],
)


def assert_same_row(a: Prefill, row: int, b: Prefill, other: int, tolerance: float = SAME) -> None:
    """The same logits, positions and entries, wherever the padding and however many the slots."""
    np.testing.assert_allclose(a.logits[row], b.logits[other], rtol=0, atol=tolerance)
    for one, two in zip(layers(a.cache), layers(b.cache), strict=True):
        heads = filled_by_head(one.positions[row]), filled_by_head(two.positions[other])
        for head, (kept, theirs) in enumerate(zip(*heads, strict=True)):
            np.testing.assert_array_equal(kept, theirs)
            for x, y in ((one.k, two.k), (one.v, two.v)):
                mine, theirs = (c[r, head][-len(kept) :] for c, r in ((x, row), (y, other)))
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)
    assert (a.propagated is None) == (b.propagated is None)
    if a.propagated is not None and b.propagated is not None:
        np.testing.assert_array_equal(*(filled(x.propagated[r][None]) for x, r in ((a, row), (b, other))))


@pytest.mark.parametrize("tails", [0, TAILS], ids=["no tail", "a tail for each row"])
@in_the_oracle
def test_prefill_of_a_ragged_batch_agrees_with_the_oracle(method: Method, tails: tuple[int, ...] | int):
    ours = ragged(method, tails)
    for row, (prompt, tail) in enumerate(zip(PROMPTS, np.broadcast_to(tails, len(PROMPTS)), strict=True)):
        theirs = oracle_forward(*oracle_model(), prompt, method=oracle_settings(method), window_end=int(tail))
        np.testing.assert_allclose(ours.logits[row], theirs.logits, rtol=0, atol=LOGITS)
        for i, entries in enumerate(layers(ours.cache)):
            np.testing.assert_array_equal(filled(entries.positions[row]), theirs.kept[i])
            slots = theirs.kept[i].shape[1]
            np.testing.assert_allclose(entries.k[row, :, -slots:], theirs.k[i], rtol=0, atol=CACHE)
            np.testing.assert_allclose(entries.v[row, :, -slots:], theirs.v[i], rtol=0, atol=CACHE)
        if theirs.propagated is None:
            assert ours.propagated is None
        else:
            np.testing.assert_array_equal(filled(ours.propagated[row][None])[0], theirs.propagated)


@all_methods
def test_every_row_equals_its_run_alone_behind_more_padding(method: Method):
    for row, prompt in enumerate(PROMPTS):
        wider = fk.pad_batch([prompt], WIDER)
        alone = fk.prefill(model_a(), *wider, method=method, max_new_tokens=NEW)
        assert_same_row(alone, 0, ragged(method), row)


@all_methods
def test_what_stands_in_the_padding_changes_nothing(method: Method):
    tokens, start = batch()
    noise = np.random.default_rng(0).integers(0, 128, tokens.shape)
    noisy = np.where(np.arange(BUCKET) < start[:, None], noise, tokens)
    dirty = fk.prefill(model_a(), noisy, start, method=method, max_new_tokens=NEW)
    for row in range(len(PROMPTS)):
        assert_same_row(dirty, row, ragged(method), row, tolerance=0)


SMALL = 30  # programs that look up, join and pad arrays


def test_compilations_are_counted():
    before = compilations()
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert compilations() > before


@all_methods
def test_all_lengths_of_a_bucket_share_one_compilation(method: Method):
    def read(prompt: np.ndarray) -> None:
        fk.prefill(model_a(), *fk.pad_batch([prompt], WIDER), method=method, max_new_tokens=NEW)

    read(PROMPTS[-1])
    if isinstance(method, Adaptive):  # its programs are the same for every layer, but some run only once one is found
        for prompt in PROMPTS:
            read(prompt)
    before = compilations()
    for prompt in PROMPTS:
        read(prompt[::-1])
    assert compilations() == before


def test_all_tails_up_to_64_tokens_share_one_compilation():
    def read(tails: tuple[int, ...]) -> None:
        fk.prefill(model_a(), *batch(), method=FASTKV, max_new_tokens=NEW, window_end=np.array(tails))

    read(TAILS)
    before = compilations()
    for tail in (1, 9, 33, 64):
        read((0, 0, 0, tail, 5, tail))
    assert compilations() == before


@that_can_be_traced
def test_prefill_under_an_outer_jit_is_the_same(method: Method):
    @jax.jit
    def outer(model, tokens, start):
        return fk.prefill(model, tokens, start, method=method, max_new_tokens=NEW)

    traced = outer(model_a(), *(jnp.asarray(a) for a in batch()))
    for row in range(len(PROMPTS)):
        assert_same_row(traced, row, ragged(method), row)


@one_of_each
def test_prefill_that_reports_progress_is_the_same(method: Method):
    done: list[int] = []
    reported = fk.prefill(model_a(), *batch(), method=method, max_new_tokens=NEW, progress=done.append)
    assert sum(done) == layers_run(method, LAYERS)
    for row in range(len(PROMPTS)):
        assert_same_row(reported, row, ragged(method), row)


def test_a_method_that_decides_on_the_host_cannot_be_traced():
    with pytest.raises(fk.InputError, match="ASL decides on the host: it cannot run inside another jit"):
        method = EXAMPLES["asl"][0]
        jax.eval_shape(
            lambda tokens: fk.prefill(model_a(), tokens, method=method, max_new_tokens=1), jnp.zeros((1, 16), jnp.int32)
        )


def test_the_options_that_are_described_are_those_that_are_taken():
    taken = {
        name: parameter.default
        for name, parameter in inspect.signature(prepare).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert list(taken) == list(PrefillOptions.__annotations__)
    asked = {name for name, default in taken.items() if default is inspect.Parameter.empty}
    assert asked == PrefillOptions.__required_keys__ == {"method", "max_new_tokens"}
    for name in taken:
        assert re.search(rf"^ +{name}: ", PrefillOptions.__doc__, re.MULTILINE), name


def test_what_is_compiled_ahead_is_what_runs():
    """Also of a method that decides on the host, whatever it decides."""
    for method in (EXAMPLES["asl"][0], FASTKV):
        tokens, start = fk.pad_batch(PROMPTS[-1:], 320)
        asked = prepare(model_a(), tokens, start, method=method, max_new_tokens=NEW)
        asked.compile(lambda layers: None)
        before = compilations()
        asked.run(lambda layers: None)
        assert compilations() - before <= SMALL  # no program of the model


FULL_BUDGET = {
    "fastkv": fk.FastKV(tsp_layer=1, tsp_rate=1.0, retention_rate=1.0),
    "several tsp layers": fk.FastKV(tsp_layers=(0, 1, 2), tsp_rate=1.0, compression=fk.TOVA(retention_rate=1.0)),
    "gemfilter": fk.GemFilter(filter_layer=1, retention_rate=1.0),
    "pyramidinfer": fk.PyramidInfer(decay_ratio=1.0),
    "claa": fk.CLAA(tsp_layer=2, retention_rate=1.0),
    "asl": fk.ASL(tsp_rate=1.0, min_layer=1, score_layers=2),
} | {
    name: kind(retention_rate=1.0)
    for name, kind in fk.METHODS.items()
    if name not in ("full", "fastkv", "gemfilter", "pyramidinfer", "claa", "asl")
}


@pytest.mark.parametrize("method", FULL_BUDGET.values(), ids=list(FULL_BUDGET))
def test_a_full_budget_equals_full_context_bit_for_bit(method: Method):
    in_parts = isinstance(method, fk.ASL)  # other programs, whose sums are taken in another order
    tolerance = SAME if in_parts else 0
    np.testing.assert_allclose(ragged(method).logits, ragged(fk.FullKV()).logits, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(greedy(method), greedy(fk.FullKV()))


def test_a_prompt_below_its_budget_equals_full_context():
    method = fk.FastKV(tsp_layer=1, tsp_length=140, capacity=135)
    for row, n in enumerate(LENGTHS):
        if n <= 135:
            np.testing.assert_allclose(ragged(method).logits[row], ragged(fk.FullKV()).logits[row], rtol=0, atol=SAME)
            np.testing.assert_array_equal(greedy(method)[row], greedy(fk.FullKV())[row])
        else:
            assert np.abs(ragged(method).logits[row] - ragged(fk.FullKV()).logits[row]).max() > LOGITS


def test_a_prompt_below_min_prompt_to_compress_equals_full_context():
    method = fk.FastKV(tsp_layer=1, tsp_rate=0.3, retention_rate=0.2, min_prompt_to_compress=132)
    for row in range(5):
        np.testing.assert_allclose(ragged(method).logits[row], ragged(fk.FullKV()).logits[row], rtol=0, atol=SAME)
        np.testing.assert_array_equal(greedy(method)[row], greedy(fk.FullKV())[row])
    assert filled(ragged(method).cache.layer(0).positions[5]).shape == (2, 51)


@one_of_each
def test_bfloat16_runs_and_is_near(method: Method):
    model = fk.load_model(MODEL_A, dtype="bfloat16")
    prompt = fk.prefill(model, *batch(), method=method, max_new_tokens=NEW)
    assert prompt.logits.dtype == jnp.float32
    assert prompt.cache.segments[0].k.dtype == prompt.cache.k_new.dtype == jnp.bfloat16
    full = method == fk.FullKV()
    rows = slice(None) if full else slice(0, 3)  # of longer prompts, rounding may keep other entries
    np.testing.assert_allclose(prompt.logits[rows], ragged(method).logits[rows], rtol=0, atol=LOGITS_BF16)
    logits, _ = fk.decode_step(model, jnp.argmax(prompt.logits, axis=-1), prompt.cache)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["full", "fastkv", "adakv", "asl"])
def test_a_cache_of_8_bits_is_near_and_keeps_the_same_entries(name: str, dtype: str):
    method = EXAMPLES[name][0]
    whole = ragged(method)
    small = fk.prefill(model_a(), *batch(), method=method, max_new_tokens=NEW, kv_dtype=dtype)
    np.testing.assert_array_equal(small.logits, whole.logits)
    for one, two in zip(layers(small.cache), layers(whole.cache), strict=True):
        np.testing.assert_array_equal(one.positions, two.positions)
        np.testing.assert_allclose(one.k, two.k, rtol=0.1, atol=0.1)
    entry = lambda cache: sum(a.nbytes for a in jax.tree.leaves(cache.segments))  # noqa: E731
    assert entry(small.cache) < 0.5 * entry(whole.cache)
    logits, _ = fk.decode_step(model_a(), np.argmax(small.logits, axis=-1), small.cache)
    again = fk.prefill(model_a(), *batch(), method=method, max_new_tokens=NEW)
    expected, _ = fk.decode_step(model_a(), np.argmax(again.logits, axis=-1), again.cache)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_BF16)


def test_an_unknown_dtype_of_the_cache_is_refused():
    with pytest.raises(fk.FastKVConfigError, match="kv_dtype must be None or one of int8, float8_e4m3fn, got 'int4'"):
        fk.prefill(model_a(), *batch(), method=FASTKV, max_new_tokens=NEW, kv_dtype="int4")
