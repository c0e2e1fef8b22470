"""The public doors refuse what would otherwise be clamped, dropped or wrapped in silence."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import fastkv_jax as fk
from fastkv_jax import checkpoint
from fastkv_jax.inputs import check_batch, static_tail

CONFIG = checkpoint.inspect(Path(__file__).parent / "golden" / "reference" / "models" / "A")
SHORT = dataclasses.replace(CONFIG, max_position_embeddings=16)
SLIDING = dataclasses.replace(CONFIG, sliding_window=8)


@pytest.mark.parametrize(
    ("tokens", "start", "window_end", "config", "new", "complaint"),
    (
        ([1, 2, 3], None, 0, CONFIG, 1, r"input_ids must be int32 of shape \[batch, length\], got int64 \[3\]"),
        ([[0.5, 1.0]], None, 0, CONFIG, 1, r"input_ids must be int32 .* got float64 \[1, 2\]"),
        ([[]], None, 0, CONFIG, 1, "input_ids must be int32|prompt is empty"),
        (np.zeros((1, 0), np.int32), None, 0, CONFIG, 1, "prompt is empty"),
        ([[1, 2], [3, 128]], None, 0, CONFIG, 1, r"token id 128 at \[1, 1\] is outside the vocabulary of 128"),
        ([[1, -1]], None, 0, CONFIG, 1, r"token id -1 at \[0, 1\] is outside the vocabulary"),
        ([[1, 2], [3, 4]], [0, 2], 0, CONFIG, 1, "row 1 of the batch is empty"),
        ([[1, 2]], [-1], 0, CONFIG, 1, "start -1 of row 0 is outside 0..1"),
        ([[1, 2]], [0, 0], 0, CONFIG, 1, r"start must be int32 of shape \[1\], got int64 \[2\]"),
        ([[1, 2]], None, 2, CONFIG, 1, r"window_end 2 leaves no question in row 0 \(2 tokens\)"),
        ([[1, 2]], None, -1, CONFIG, 1, "window_end must be integers >= 0, got -1"),
        ([[1, 2]], None, 0, CONFIG, -1, "max_new_tokens must be an integer >= 0, got -1"),
        ([[1] * 16], None, 0, SHORT, 1, r"prompt has 16 tokens \+ 1 new > 16 \(max_position_embeddings\)"),
        ([[1] * 16], None, 0, SHORT, 0, r"prompt has 16 tokens \+ 1 new > 16"),
        ([[1] * 8], None, 0, SLIDING, 4, r"sliding-window attention is not implemented: 8 tokens \+ 4 new > 8"),
    ),
)
def test_bad_batches_are_answered_with_the_value_and_its_place(tokens, start, window_end, config, new, complaint):
    with pytest.raises(fk.InputError, match=complaint):
        check_batch(tokens, start, window_end, config, new)


def test_padding_does_not_count_against_the_context():
    prompt = check_batch([[0] * 30 + [1, 2]], [30], 0, SHORT, 4)
    assert prompt.tokens.dtype == prompt.start.dtype == np.int32


def test_traced_batches_pass_unchecked():
    def inside(tokens, start):
        prompt = check_batch(tokens, start, 0, CONFIG, 4)
        return prompt.tokens + prompt.start[:, None]

    assert jax.jit(inside)(np.array([[1, 999]]), np.array([1])).shape == (1, 2)


def test_tails_of_a_chat_template_share_a_compilation():
    assert [static_tail(np.array([tail])) for tail in (0, 1, 5, 64, 65)] == [0, 64, 64, 64, 128]
