"""Prefill in chunks: exact where nothing is evicted, within its budget where something is."""

import jax
import numpy as np
import pytest

import fastkv_jax as fk
from examples import EXAMPLES, NEW, PROMPTS, TAILS, layers, model_a
from fastkv_jax.errors import InputError
from fastkv_jax.methods.base import Method
from tolerances import SAME

IN_CHUNKS = ("fastkv", "adakv", "h2o", "claa")  # rows that go on, a flat cache, no window, layers that keep all


def read(method: Method, chunk: int | None, prompts=PROMPTS, tails=TAILS, **options):
    tokens, start = fk.pad_batch(prompts)
    options = {"max_new_tokens": NEW, "window_end": np.array(tails)} | options
    return fk.prefill(model_a(), tokens, start, method=method, prefill_chunk=chunk, **options)


def entries(cache) -> list[list[list[dict[int, np.ndarray]]]]:
    """Of each layer, row and head, by position."""
    return [
        [
            [
                {int(p): np.concatenate([k, v]) for p, k, v in zip(*head, strict=True) if p >= 0}
                for head in zip(*row, strict=True)
            ]
            for row in zip(one.positions, one.k, one.v, strict=True)
        ]
        for one in layers(cache)
    ]


def assert_same(one, two) -> None:
    np.testing.assert_allclose(one.logits, two.logits, rtol=0, atol=SAME)
    np.testing.assert_array_equal(one.cache.position, two.cache.position)
    for layer in zip(entries(one.cache), entries(two.cache), strict=True):
        for row in zip(*layer, strict=True):
            for mine, theirs in zip(*row, strict=True):
                assert mine.keys() == theirs.keys()
                there = [theirs[position] for position in mine]
                np.testing.assert_allclose([*mine.values()], there, rtol=0, atol=SAME)


@pytest.mark.parametrize("chunk", [37, 128])
def test_full_context_in_chunks_is_full_context(chunk: int):
    assert_same(read(fk.FullKV(), chunk), read(fk.FullKV(), None))


def test_in_one_chunk_every_method_keeps_what_it_keeps_of_the_whole():
    for method in (EXAMPLES["fastkv"][0], EXAMPLES["adakv"][0]):
        prompt, tail = PROMPTS[5:6], TAILS[5:6]
        one, whole = read(method, 300, prompt, tail), read(method, None, prompt, tail)
        np.testing.assert_allclose(one.logits, whole.logits, rtol=0, atol=SAME)
        for (of_one,), (of_whole,) in zip(entries(one.cache), entries(whole.cache), strict=True):
            for mine, theirs in zip(of_one, of_whole, strict=True):
                assert len(mine.keys() ^ theirs.keys()) <= 2  # a chunk's budget is rounded up


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_every_method_keeps_its_share_of_every_chunk_and_the_question(name: str):
    method = EXAMPLES[name][0]
    found, whole = read(method, 60), read(method, None)
    n, asked = len(PROMPTS[5]), int(method.window(np.array([len(PROMPTS[5])]))[0]) + TAILS[5]
    in_chunks, at_once = ([rows[5] for rows in entries(result.cache)] for result in (found, whole))
    kept, allowed = (sum(len(head) for heads in layer_heads for head in heads) for layer_heads in (in_chunks, at_once))
    assert (
        0.85 * allowed <= kept <= 1.1 * allowed + 8 * 5
    )  # rounded up in each of five chunks, of four layers' two heads
    for heads in in_chunks:
        for head in heads:
            assert max(head, default=0) < n
            if method.window(np.array([n]))[0] and head:
                assert set(range(n - asked, n)) <= head.keys()


def test_generate_reads_in_chunks_and_rows_do_not_see_each_other():
    method = EXAMPLES["fastkv"][0]
    options = {"method": method, "max_new_tokens": 4, "prefill_chunk": 50, "stop_tokens": ()}
    together = fk.generate(model_a(), *fk.pad_batch(PROMPTS[4:6]), window_end=np.array(TAILS[4:6]), **options)
    alone = fk.generate(model_a(), *fk.pad_batch(PROMPTS[5:6]), window_end=np.array(TAILS[5:6]), **options)
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])


def test_entries_of_8_bits():
    small, whole = (read(EXAMPLES["snapkv"][0], 60, kv_dtype=dtype) for dtype in ("int8", None))
    assert small.cache.segments[0].k.dtype == np.int8
    np.testing.assert_allclose(small.logits, whole.logits, rtol=0, atol=0.1)


def test_all_chunks_run_one_program():
    from fastkv_jax.prefilling.passes import run_jit

    method = EXAMPLES["fastkv"][0]
    read(method, 60)
    before = run_jit._cache_size()
    read(method, 60, [p[::-1].copy() for p in PROMPTS])
    assert run_jit._cache_size() == before


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (fk.FullKV(), {"prefill_chunk": 0}, "prefill_chunk must be an integer >= 1, got 0"),
        (EXAMPLES["gemfilter"][0], {"prefill_chunk": 60}, "GemFilter reads the prompt twice: it cannot read chunks"),
        (EXAMPLES["asl"][0], {"prefill_chunk": 60}, "ASL looks at whole prompts: it cannot read chunks"),
    ],
)
def test_what_cannot_be_is_refused(method: Method, options, message: str):
    with pytest.raises(InputError, match=message):
        fk.prefill(model_a(), *fk.pad_batch(PROMPTS), method=method, max_new_tokens=0, **options)


def test_neither_traced_tokens_nor_a_cache_go_with_chunks():
    tokens, start = fk.pad_batch(PROMPTS)
    with pytest.raises(InputError, match="prefill_chunk loops on the host"):
        jax.jit(
            lambda t: fk.prefill(model_a(), t, start, method=fk.FullKV(), max_new_tokens=0, prefill_chunk=37).logits
        )(tokens)
    cache = read(fk.FullKV(), 37).cache
    with pytest.raises(InputError, match="it cannot go on from a cache"):
        read(fk.FullKV(), 37, cache=cache, tails=[0] * len(PROMPTS))
