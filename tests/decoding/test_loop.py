"""Decoding: what `generate` and `decode_step` return, against the oracle and against each other."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

import fastkv_jax as fk
from examples import (
    EXAMPLES,
    GOLDEN,
    IN_ORACLE,
    LENGTHS,
    METHODS,
    MODEL_A,
    NEW,
    PROMPTS,
    batch,
    generate,
    greedy,
    model_a,
    oracle_settings,
)
from examples import weights_a as oracle_model
from fastkv_jax.decoding.loop import decode_chunks
from fastkv_jax.methods.base import Method
from kernels_pallas import gpu_backend
from oracle import oracle_generate
from tolerances import CACHE

FASTKV = METHODS[1]
in_the_oracle = pytest.mark.parametrize("method", IN_ORACLE, ids=["full", "fastkv-0", "fastkv-1", "fastkv-2"])
one_of_each = pytest.mark.parametrize("method", [examples[0] for examples in EXAMPLES.values()], ids=list(EXAMPLES))


@in_the_oracle
def test_greedy_tokens_agree_with_the_oracle(method: Method):
    for row, prompt in enumerate(PROMPTS):
        tokens, _ = oracle_generate(*oracle_model(), prompt, NEW, method=oracle_settings(method))
        assert greedy(method)[row].tolist() == tokens


@one_of_each
def test_generate_equals_repeated_decode_steps(method: Method):
    prompt = fk.prefill(model_a(), *batch(), method=method, max_new_tokens=NEW)
    logits, cache, tokens = prompt.logits, prompt.cache, []
    for _ in range(NEW):
        tokens.append(np.argmax(logits, axis=-1))
        logits, cache = fk.decode_step(model_a(), tokens[-1], cache)
    np.testing.assert_array_equal(greedy(method), np.stack(tokens, axis=1))
    np.testing.assert_array_equal(cache.position, np.array(LENGTHS) + NEW)
    np.testing.assert_array_equal(cache.filled, NEW)
    assert int(cache.used) == NEW


def test_a_decode_step_without_room_is_refused():
    prompt = fk.prefill(model_a(), *batch(), method=FASTKV, max_new_tokens=0)
    with pytest.raises(fk.InputError, match=r"cache is full \(\d+/\d+\): it has room for max_new_tokens=0"):
        fk.decode_step(model_a(), np.zeros(len(PROMPTS), np.int32), prompt.cache)
    prompt = fk.prefill(model_a(), *batch(), method=FASTKV, max_new_tokens=NEW)
    cache = prompt.cache
    for _ in range(NEW):
        _, cache = fk.decode_step(model_a(), np.zeros(len(PROMPTS), np.int32), cache)
    with pytest.raises(fk.InputError, match="cache is full"):
        fk.decode_step(model_a(), np.zeros(len(PROMPTS), np.int32), cache)


def test_no_new_tokens_is_a_prefill_alone():
    made = generate(FASTKV, max_new_tokens=0)
    assert made.tokens.shape == (len(PROMPTS), 0)
    np.testing.assert_array_equal(made.lengths, 0)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_new_tokens_are_a_prefix(tokens: int):
    np.testing.assert_array_equal(generate(FASTKV, max_new_tokens=tokens).tokens, greedy(FASTKV)[:, :tokens])


def test_a_row_ends_at_its_stop_token_and_is_padded_after_it():
    free = greedy(FASTKV)
    stop = (int(free[3, 2]), int(free[5, 0]))
    made = generate(FASTKV, stop_tokens=stop)
    for row, tokens in enumerate(free):
        met = np.flatnonzero(np.isin(tokens, stop))
        length = met[0] + 1 if met.size else NEW
        assert int(made.lengths[row]) == length
        assert made.tokens[row].tolist() == [*tokens[:length], *[0] * (NEW - length)]
    assert int(made.lengths[5]) == 1 and int(made.lengths[3]) <= 3 and int(made.lengths.max()) > 3


def test_all_rows_may_stop_at_once():
    made = generate(FASTKV, stop_tokens=greedy(FASTKV)[:, 0].tolist())
    np.testing.assert_array_equal(made.lengths, 1)
    np.testing.assert_array_equal(made.tokens[:, 1:], 0)


def test_stop_and_pad_tokens_come_from_the_checkpoint_unless_given(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL_A, folder)
    stop, pad = int(greedy(FASTKV)[4, 1]), 5
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop], "pad_token_id": pad}))
    model = fk.load_model(folder, dtype="float32")
    made = fk.generate(model, *batch(), method=FASTKV, max_new_tokens=NEW)
    expected = generate(FASTKV, stop_tokens=(stop,))
    np.testing.assert_array_equal(made.lengths, expected.lengths)
    after = np.arange(NEW) >= np.asarray(made.lengths)[:, None]
    np.testing.assert_array_equal(made.tokens, np.where(after, pad, expected.tokens))
    assert after[4].sum() >= NEW - 2
    unstopped = fk.generate(model, *batch(), method=FASTKV, max_new_tokens=NEW, stop_tokens=())
    np.testing.assert_array_equal(unstopped.tokens, greedy(FASTKV))


def test_a_model_with_broken_weights_is_reported_not_decoded():
    model = model_a()
    leaves, tree = jax.tree.flatten(model)
    broken = jax.tree.unflatten(tree, [jnp.full_like(leaf, jnp.nan) for leaf in leaves])
    with pytest.raises(fk.CheckpointError, match="non-finite logits at step 0"):
        fk.generate(broken, *batch(), method=FASTKV, max_new_tokens=NEW)


def test_sampling_is_reproducible_by_key():
    sampler = fk.Sample(temperature=1.5, top_p=0.95, top_k=50)
    first, again, other = (
        np.asarray(generate(FASTKV, sampler=sampler, key=jax.random.key(seed)).tokens) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    with pytest.raises(fk.InputError, match=r"Sample needs key=jax.random.key\(seed\)"):
        generate(FASTKV, sampler=sampler)


def test_sampling_from_the_best_token_alone_is_greedy():
    made = generate(FASTKV, sampler=fk.Sample(top_k=1), key=jax.random.key(0))
    np.testing.assert_array_equal(made.tokens, greedy(FASTKV))


def test_its_cache_goes_with_the_tokens_that_have_been_shown():
    """The newest token has not been fed: a row's cache holds one fewer than were made."""
    prompt = fk.prefill(model_a(), *batch(), method=FASTKV, max_new_tokens=NEW)
    decoding, made = decode_chunks(model_a(), prompt, max_new_tokens=NEW, stop_tokens=()), 0
    for chunk, _ in decoding:
        made += chunk.shape[1]
        np.testing.assert_array_equal(decoding.cache.filled, made - 1)
        np.testing.assert_array_equal(decoding.cache.position, np.array(LENGTHS) + made - 1)
    assert made == NEW and next(decoding, None) is None


# On a GPU: its kernels, interpreted; and its loop, whose turns are all taken.


@pytest.fixture
def interpreted(monkeypatch):
    """The GPU's kernels run on this CPU."""
    call = pallas.pallas_call
    monkeypatch.setattr(
        gpu_backend.pl, "pallas_call", lambda kernel, **choice: call(kernel, **choice | {"interpret": True})
    )


ROWS = fk.pad_batch([PROMPTS[3] % 96, PROMPTS[2] % 96], 128)  # 80 and 9 tokens


def decoded_on_a_gpu(model, method: Method, new: int, stop_tokens=(), **options):
    """Tokens [B, new], zeros behind a row's end, and the cache that is left."""
    prompt = fk.prefill(model, *ROWS, method=method, max_new_tokens=new, **options)
    decoding = decode_chunks(model, prompt, max_new_tokens=new, stop_tokens=stop_tokens, kernels="gpu")
    made = np.concatenate([chunk for chunk, _ in decoding], axis=1)
    return np.pad(made, ((0, 0), (0, new - made.shape[1]))), decoding.cache


GPU_CASES = {
    "full": (fk.FullKV(), {}),
    "fastkv, 8 bits": (FASTKV, {"kv_dtype": "int8"}),
    "flat, 8 bits": (EXAMPLES["adakv"][0], {"kv_dtype": "float8_e4m3fn"}),
    "a cache for each query head": (EXAMPLES["snapkv"][1], {}),
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("method", "options"), GPU_CASES.values(), ids=list(GPU_CASES))
def test_a_gpu_makes_the_same_tokens(method: Method, options: dict):
    """11 tokens: one from the prompt, eight of a call, two of another, whose six other turns do not count."""
    made, cache = decoded_on_a_gpu(model_a(), method, 11, **options)
    theirs = fk.generate(model_a(), *ROWS, method=method, max_new_tokens=11, stop_tokens=(), **options)
    np.testing.assert_array_equal(made, theirs.tokens)
    np.testing.assert_array_equal(cache.filled, 10)
    np.testing.assert_array_equal(cache.position, theirs.cache.position)
    assert int(cache.used) == 10
    for mine, other in ((cache.k_new, theirs.cache.k_new), (cache.v_new, theirs.cache.v_new)):
        np.testing.assert_allclose(mine[..., :10, :], other[..., :10, :], rtol=0, atol=CACHE)


@pytest.mark.usefixtures("interpreted")
def test_rows_end_at_their_stop_tokens_there_as_well():
    free = fk.generate(model_a(), *ROWS, method=FASTKV, max_new_tokens=NEW, stop_tokens=())
    stop = [int(free.tokens[0, 2]), int(free.tokens[1, 4])]
    made, cache = decoded_on_a_gpu(model_a(), FASTKV, NEW, stop)
    theirs = fk.generate(model_a(), *ROWS, method=FASTKV, max_new_tokens=NEW, stop_tokens=stop)
    assert int(theirs.lengths.max()) < NEW
    np.testing.assert_array_equal(made, theirs.tokens)
    np.testing.assert_array_equal(cache.filled + 1, theirs.lengths)


@pytest.mark.usefixtures("interpreted")
def test_turns_that_do_not_count_end_no_row():
    """They emit the pad token, which may be a stop token as well."""
    prompt = fk.prefill(model_a(), *ROWS, method=fk.FullKV(), max_new_tokens=4)
    made = [done for _, done in decode_chunks(model_a(), prompt, max_new_tokens=4, stop_tokens=(0,), kernels="gpu")]
    np.testing.assert_array_equal(made[-1], [False, False])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("axis", ["data", "model"])
def test_two_gpus_make_the_same_tokens(axis: str):
    mesh = jax.make_mesh((2,), (axis,), devices=jax.devices()[:2])
    made, _ = decoded_on_a_gpu(fk.load_model(MODEL_A, dtype="float32", mesh=mesh), FASTKV, 5, kv_dtype="int8")
    theirs = fk.generate(model_a(), *ROWS, method=FASTKV, max_new_tokens=5, stop_tokens=(), kv_dtype="int8")
    np.testing.assert_array_equal(made, theirs.tokens)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("folder", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads_are_applied_there(folder: str):
    model = fk.load_model(GOLDEN / "transformers" / folder, dtype="float32")
    made, _ = decoded_on_a_gpu(model, fk.FullKV(), 4)
    theirs = fk.generate(model, *ROWS, method=fk.FullKV(), max_new_tokens=4, stop_tokens=())
    np.testing.assert_array_equal(made, theirs.tokens)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernels", ["gpu", "reference"])
def test_a_cache_that_is_cut_into_runs_is_the_same_cache(kernels: str, monkeypatch):
    """As if 32 bits were few: the 8-bit entries of two of four layers are as many as are found.

    Prefill leaves runs where it knows that a GPU will read them; decoding cuts what it is given.
    """
    whole, cache = decoded_on_a_gpu(model_a(), fk.FullKV(), 5, kv_dtype="int8")
    each = cache.segments[0].k[0].size
    monkeypatch.setattr(gpu_backend, "_NARROW_ELEMENTS", 2 * each)
    monkeypatch.setattr(gpu_backend, "_NARROW_BYTES", 4 * each)
    options = {"method": fk.FullKV(), "max_new_tokens": 5, "kv_dtype": "int8", "kernels": kernels}
    left = fk.prefill(model_a(), *ROWS, **options).cache.segments
    assert [segment.k.shape[0] for segment in left] == ([2, 2] if kernels == "gpu" else [4])
    cut, cache = decoded_on_a_gpu(model_a(), fk.FullKV(), 5, kv_dtype="int8", kernels=kernels)
    assert [segment.k.shape[0] for segment in cache.segments] == [2, 2]
    np.testing.assert_array_equal(cut, whole)
