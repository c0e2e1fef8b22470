"""Several questions and several turns on one cache, and the cache in a file."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastkv_jax as fk
from examples import EXAMPLES, MODEL_A, NEW, filled_by_head, layers, model_a
from fastkv_jax.cache.on_disk import load_note
from fastkv_jax.methods.base import Method
from tolerances import SAME

FULL = fk.FullKV()
random = np.random.default_rng(0)
DOCUMENTS = [random.integers(0, 128, n) for n in (150, 61, 90)]
QUESTIONS = [[random.integers(0, 128, n) for n in lengths] for lengths in ((12, 30, 1), (5, 9, 26))]  # of one bucket
LONGER = [[*document, *question] for document, question in zip(DOCUMENTS, QUESTIONS[0], strict=True)]
KEEPS_ALL = [
    FULL,
    fk.AdaKV(retention_rate=1.0),
    fk.SnapKV.reference(retention_rate=1.0),
    fk.ASL(tsp_rate=1.0, min_layer=1),
]
one_of_each = pytest.mark.parametrize("method", [e[0] for e in EXAMPLES.values()], ids=list(EXAMPLES))


def read(prompts, method: Method = FULL, **options):
    tokens, start = fk.pad_batch(prompts)
    return fk.prefill(model_a(), tokens, start, method=method, **({"max_new_tokens": NEW} | options))


def generate(prompts, method: Method = FULL, **options):
    tokens, start = fk.pad_batch(prompts)
    settings = {"max_new_tokens": NEW, "stop_tokens": ()} | options
    return fk.generate(model_a(), tokens, start, method=method, **settings)


@pytest.mark.parametrize("method", KEEPS_ALL, ids=lambda method: type(method).__name__)
def test_a_second_turn_on_an_uncompressed_cache_equals_one_long_prompt(method: Method):
    cache = read(DOCUMENTS, method).cache
    second = read(QUESTIONS[0], cache=cache)
    whole = read(LONGER)
    np.testing.assert_allclose(second.logits, whole.logits, rtol=0, atol=SAME)
    np.testing.assert_array_equal(second.cache.position, whole.cache.position)
    tokens = generate(QUESTIONS[0], cache=cache).tokens
    np.testing.assert_array_equal(tokens, generate(LONGER).tokens)
    for ours, theirs in zip(layers(second.cache), layers(whole.cache), strict=True):
        for row in range(3):
            for head in range(2):
                there = ours.positions[row, head * ours.k.shape[1] // 2] >= 0
                n = there.sum()
                mine = ours.k[row, head * ours.k.shape[1] // 2][there]
                np.testing.assert_allclose(mine, theirs.k[row, head, -n:], rtol=0, atol=SAME)


def test_a_turn_after_an_answer_goes_on_from_it():
    """Rows that stopped earlier go on from where they stopped."""
    free = np.asarray(generate(DOCUMENTS).tokens)
    stop = (int(free[1, 2]),)
    first = generate(DOCUMENTS, stop_tokens=stop)
    lengths = np.asarray(first.lengths)
    assert lengths[1] <= 3 and lengths.max() > 3
    answers = [list(np.asarray(first.tokens)[b, : lengths[b]]) for b in range(3)]
    following = [[answer[-1], *question] for answer, question in zip(answers, QUESTIONS[0], strict=True)]
    second = generate(following, cache=first.cache)
    whole = [[*d, *a, *q] for d, a, q in zip(DOCUMENTS, answers, QUESTIONS[0], strict=True)]
    np.testing.assert_array_equal(second.tokens, generate(whole).tokens)
    np.testing.assert_array_equal(second.cache.position, np.array([len(w) for w in whole]) + NEW - 1)


def test_turns_by_single_steps_are_the_same():
    prompt = read(DOCUMENTS)
    logits, cache, fed = prompt.logits, prompt.cache, []
    for _ in range(3):
        fed.append(np.argmax(logits, axis=-1))
        logits, cache = fk.decode_step(model_a(), fed[-1], cache)
    second = read(QUESTIONS[0], cache=cache)
    whole = [[*d, *(step[b] for step in fed), *QUESTIONS[0][b]] for b, d in enumerate(DOCUMENTS)]
    np.testing.assert_allclose(second.logits, read(whole).logits, rtol=0, atol=SAME)


@one_of_each
def test_every_method_can_read_the_document_and_leaves_its_cache_as_it_was(method: Method):
    cache = read(DOCUMENTS, method).cache
    before = jax.tree.map(np.asarray, cache)
    answers = [generate(questions, cache=cache).tokens for questions in QUESTIONS]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(read(questions, cache=cache).logits).all() for questions in QUESTIONS)
    np.testing.assert_array_equal(answers[0], generate(QUESTIONS[0], cache=cache).tokens)


@one_of_each
def test_every_method_may_choose_among_the_new_tokens(method: Method):
    """What the cache held stays; of the new tokens the method keeps what it would of a prompt of that length."""
    first = read(DOCUMENTS, fk.SnapKV(retention_rate=0.3)).cache
    more = [random.integers(0, 128, n) for n in (70, 100, 64)]
    both = read(more, method, cache=first)
    alone = read(more, method)
    assert np.isfinite(both.logits).all()
    for before, after, apart in zip(*(layers(cache) for cache in (first, both.cache, alone.cache)), strict=True):
        for row, document in enumerate(DOCUMENTS):
            old = filled_by_head(before.positions[row])
            new = after.positions[row]
            kept_alone = filled_by_head(apart.positions[row])
            total = [int((head >= 0).sum()) for head in new]
            heads = len(new)
            assert sum(total) == sum(len(old[h * 2 // heads]) for h in range(heads)) + sum(map(len, kept_alone))
            for h, head in enumerate(new):
                kept = head[head >= 0]
                assert kept[kept < len(document)].tolist() == old[h * 2 // heads].tolist()


def test_padding_of_a_turn_changes_nothing():
    cache = read(DOCUMENTS).cache
    tokens, start = fk.pad_batch(QUESTIONS[0], 64)
    wide = fk.prefill(model_a(), tokens, start, method=FULL, max_new_tokens=NEW, cache=cache)
    np.testing.assert_allclose(wide.logits, read(QUESTIONS[0], cache=cache).logits, rtol=0, atol=SAME)


def test_what_cannot_go_on_is_refused():
    cache = read(DOCUMENTS).cache
    with pytest.raises(fk.InputError, match="the cache holds 3 rows, the batch 2"):
        read(QUESTIONS[0][:2], cache=cache)
    with pytest.raises(fk.InputError, match="GemFilter numbers its rows anew; it cannot go on from a cache"):
        read(QUESTIONS[0], fk.GemFilter.reference(filter_layer=1), cache=cache)
    limit = model_a().config.max_position_embeddings
    far = dataclasses.replace(cache, position=jnp.full(3, limit - 10))
    with pytest.raises(fk.InputError, match=r"max_position_embeddings"):
        read(QUESTIONS[0], cache=far)


# ---------------------------------------------------------------------------------------------------------- in a file


@one_of_each
def test_questions_on_a_reloaded_cache_equal_those_on_the_live_one(method: Method, tmp_path):
    cache = read(DOCUMENTS, method).cache
    fk.save_cache(tmp_path / "document.kv", cache, model_a(), note={"words": 3})
    back = fk.load_cache(tmp_path / "document.kv", model_a())
    assert load_note(tmp_path / "document.kv") == {"words": 3}
    for questions in QUESTIONS:
        live, reloaded = (generate(questions, cache=c) for c in (cache, back))
        np.testing.assert_array_equal(live.tokens, reloaded.tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["document.kv"]


def test_a_cache_of_bfloat16_is_saved_too(tmp_path):
    model = fk.load_model(MODEL_A, dtype="bfloat16")
    cache = fk.prefill(model, [[1, 2, 3]], method=FULL, max_new_tokens=0).cache
    fk.save_cache(tmp_path / "c", cache, model)
    assert fk.load_cache(tmp_path / "c", model).segments[0].k.dtype == jnp.bfloat16
    with pytest.raises(fk.CheckpointError, match="another model, or with other weights or another dtype"):
        fk.load_cache(tmp_path / "c", model_a())


def tokenizer(**changes):
    return SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1} | changes, chat_template="{{ messages }}")


def test_a_cache_of_another_model_or_tokenizer_is_refused(tmp_path):
    fk.save_cache(tmp_path / "c", read(DOCUMENTS).cache, model_a(), tokenizer())
    fk.load_cache(tmp_path / "c", model_a(), tokenizer())
    fk.load_cache(tmp_path / "c", model_a())
    with pytest.raises(fk.CheckpointError, match="another tokenizer"):
        fk.load_cache(tmp_path / "c", model_a(), tokenizer(b=2))
    other = jax.tree.map(lambda a: a * 2, model_a())
    with pytest.raises(fk.CheckpointError, match="another model"):
        fk.load_cache(tmp_path / "c", other)


def test_files_that_are_no_whole_caches_are_refused(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(fk.CheckpointError, match="no such cache file"):
        fk.load_cache(path, model_a())
    fk.save_cache(path, read(DOCUMENTS).cache, model_a())
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(fk.CheckpointError):
        fk.load_cache(path, model_a())
    with pytest.raises(fk.CheckpointError, match="no cache of this library"):
        fk.load_cache(MODEL_A / "model.safetensors", model_a())
    for target, message in ((tmp_path, "it is a folder"), (tmp_path / "no" / "c", "there is no folder")):
        with pytest.raises(fk.InputError, match=message):
            fk.save_cache(target, read(DOCUMENTS).cache, model_a())
