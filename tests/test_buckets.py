"""Buckets: few sizes, little padding, rows right-aligned."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv_jax.buckets import TILE, bucket_for, pad_batch
from fastkv_jax.errors import InputError


@given(st.integers(1, 1 << 20))
def test_a_bucket_holds_its_prompt_and_wastes_little(n):
    bucket = bucket_for(n)
    assert n <= bucket and bucket_for(bucket) == bucket
    if n > 512:
        assert bucket % TILE == 0 and bucket - n < n / 4


def test_there_are_few_buckets():
    assert len({bucket_for(n) for n in range(1, 131_073)}) < 45


def test_rows_are_right_aligned():
    tokens, start = pad_batch([[5, 6], [7]], bucket=4)
    assert tokens.tolist() == [[0, 0, 5, 6], [0, 0, 0, 7]] and start.tolist() == [2, 3]
    assert tokens.dtype == start.dtype == np.int32


@pytest.mark.parametrize(
    ("prompts", "bucket", "complaint"),
    (
        ([], None, "the batch is empty"),
        ([[1], []], None, "prompt 1 of the batch is empty"),
        ([[1.5]], None, "prompt 0 must be a list of token ids"),
        ([[1, 2, 3]], 2, r"bucket 2 is smaller than the longest prompt \(3 tokens\)"),
    ),
)
def test_what_cannot_be_padded_is_named(prompts, bucket, complaint):
    with pytest.raises(InputError, match=complaint):
        pad_batch(prompts, bucket)
