"""The checks at the public doors: which value at which index is wrong. Traced arrays pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastkv_jax.errors import InputError
from fastkv_jax.model.config import LlamaConfig, RopeConfig
from fastkv_jax.prefilling.prompt import check_batch, check_lengths, static_tail

NUMBERS = dict(
    vocab_size=96, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    rms_norm_eps=1e-5, rope=RopeConfig(1e4, None), max_position_embeddings=64, tie_word_embeddings=False,
    qkv_bias=False, output_bias=False, qk_norm=False, sliding_window=None, stop_tokens=(), pad_token=None,
)  # fmt: skip
CONFIG = LlamaConfig(**NUMBERS)
SLIDING = LlamaConfig(**(NUMBERS | {"sliding_window": 8}))
TWO = np.ones((2, 6), np.int32)


def refused(tokens, start=None, window_end=0, new=4, config=CONFIG):
    with pytest.raises(InputError) as error:
        check_batch(tokens, start, window_end, config, new)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "tokens",
    [TWO, TWO.tolist(), TWO.astype(np.int64), TWO.astype(np.uint8), jnp.asarray(TWO)],
    ids=lambda t: type(t).__name__,
)
def test_a_batch_comes_back_as_int32(tokens):
    prompt = check_batch(tokens, [0, 3], [1, 2], CONFIG, 4)
    for found, wanted in zip(prompt, (TWO, [0, 3], [1, 2]), strict=True):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, wanted)


def test_what_is_left_out():
    prompt = check_batch(TWO, None, 0, CONFIG, 0)
    np.testing.assert_array_equal(prompt.start, [0, 0])
    np.testing.assert_array_equal(prompt.window_end, [0, 0])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.ones(17, np.float32), "got float32 [17]"),
        (np.ones(17, np.int32), "got int32 [17]"),
        (np.ones((2, 3)), "got float64 [2, 3]"),
        (np.ones((1, 2, 3), np.int32), "got int32 [1, 2, 3]"),
        (np.ones((2, 3), bool), "got bool [2, 3]"),
        (5, "[]"),
        ("text", "shape [batch, length]"),
        (None, "shape [batch, length]"),
        ([[1, 2], [3]], "shape [batch, length]"),
    ],
)
def test_tokens_of_another_dtype_or_rank(tokens, words):
    message = refused(tokens)
    assert message.startswith("input_ids must be int32 of shape [batch, length]") and words in message


@pytest.mark.parametrize("shape", [(0, 0), (1, 0), (0, 4)])
def test_an_empty_batch(shape):
    assert refused(np.ones(shape, np.int32)).startswith("prompt is empty")


def test_an_empty_row_is_named():
    assert refused(TWO, [0, 6]) == "row 1 of the batch is empty: start 6 leaves none of 6 columns"


@pytest.mark.parametrize("token", [96, 128_300, -1])
def test_a_token_outside_the_vocabulary_is_named_with_its_place(token):
    tokens = TWO.copy()
    tokens[1, 4] = token
    assert refused(tokens) == f"token id {token} at [1, 4] is outside the vocabulary of 96"
    assert refused(np.array([[2**40]])) == "token id 1099511627776 at [0, 0] is outside the vocabulary of 96"


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ([0], "start must be int32 of shape [2], got int64 [1]"),
        (0, "start must be int32 of shape [2], got int64 []"),
        ([0.0, 1.0], "got float64 [2]"),
        ([-1, 0], "start -1 of row 0 is outside 0..5"),
        ([0, 7], "start 7 of row 1 is outside 0..5"),
    ],
)
def test_starts_that_cannot_be(start, words):
    assert words in refused(TWO, start)


@pytest.mark.parametrize("new", [-1, 1.5, "4", None, True])
def test_new_tokens_that_cannot_be(new):
    assert refused(TWO, new=new) == f"max_new_tokens must be an integer >= 0, got {new!r}"


def test_a_prompt_must_leave_room_for_its_answer():
    message = "prompt has 60 tokens + 5 new > 64 (max_position_embeddings). Use a shorter prompt, or fewer new tokens."
    assert refused(np.ones((1, 60), np.int32), new=5) == message
    check_batch(np.ones((1, 60), np.int32), None, 0, CONFIG, 4)
    check_batch(np.ones((1, 80), np.int32), [20], 0, CONFIG, 4)  # padding does not count
    assert "60 tokens" in refused(np.ones((2, 80), np.int32), [79, 20], new=5)  # the longest row does


def test_at_least_one_new_token_is_counted():
    assert "64 tokens + 1 new > 64" in refused(np.ones((1, 64), np.int32), new=0)
    check_batch(np.ones((1, 63), np.int32), None, 0, CONFIG, 0)


def test_thousands_are_readable():
    config = LlamaConfig(**(NUMBERS | {"max_position_embeddings": 131_072}))
    with pytest.raises(InputError, match="prompt has 140,112 tokens \\+ 128 new > 131,072"):
        check_lengths(np.array([140_112]), config, 128)


def test_a_sliding_window_is_refused_only_for_prompts_it_would_cut():
    check_batch(TWO, None, 0, SLIDING, 2)
    message = "sliding-window attention is not implemented: 6 tokens + 3 new > 8 (sliding_window)"
    assert refused(TWO, new=3, config=SLIDING) == message


@pytest.mark.parametrize("window_end", [-1, [0, -1], 1.0, "1", True, [1, 2, 3], [[0], [0]]])
def test_window_ends_that_cannot_be(window_end):
    assert "window_end must be" in refused(TWO, window_end=window_end)


def test_a_window_must_leave_a_question():
    check_batch(TWO, [0, 3], [5, 2], CONFIG, 4)
    assert refused(TWO, window_end=6) == "window_end 6 leaves no question in row 0 (6 tokens)"
    assert refused(TWO, [0, 3], 3) == "window_end 3 leaves no question in row 1 (3 tokens)"


def test_traced_arrays_pass_unchecked():
    seen = []

    @jax.jit
    def check(tokens, start):
        prompt = check_batch(tokens, start, [0, 1], CONFIG, 4)
        seen.append(prompt)
        return prompt.tokens, prompt.start

    tokens, start = check(np.full((2, 6), 10_000), np.array([0, 99]))
    assert tokens.dtype == start.dtype == jnp.int32 and int(start[1]) == 99
    assert isinstance(seen[0].window_end, np.ndarray)


def test_a_traced_window_end_is_refused():
    with pytest.raises(InputError, match="window_end must be known before tracing"):
        jax.jit(lambda window_end: check_batch(TWO, None, window_end, CONFIG, 4).tokens)(1)


@pytest.mark.parametrize(("window_end", "tail"), [([0, 0], 0), ([1, 0], 64), ([64, 3], 64), ([65], 128)])
def test_the_tail_is_an_upper_bound_that_changes_seldom(window_end, tail):
    assert static_tail(np.array(window_end)) == tail
