"""Bucket sizes, and batches padded on the left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv_jax.buckets import TILE, bucket_for, pad_batch, round_up
from fastkv_jax.errors import InputError


@given(st.integers(0, 10**7), st.integers(1, 4096))
def test_rounding_up_finds_the_next_multiple(n, multiple):
    found = round_up(n, multiple)
    assert found % multiple == 0 and 0 <= found - n < multiple


@given(st.integers(1, 2**21))
def test_a_bucket_holds_its_prompts_and_little_more(n):
    bucket = bucket_for(n)
    assert bucket >= n and bucket_for(bucket) == bucket <= bucket_for(n + 1)
    if bucket > TILE:
        assert bucket % TILE == 0
    if n >= 512:
        assert (bucket - n) / bucket <= 0.2


def test_there_are_few_buckets():
    sizes = sorted({bucket_for(n) for n in range(1, 2049)})
    assert sizes == [16, 32, 64, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert len({bucket_for(n) for n in range(2**16 + 1, 2**17 + 1)}) == 4
    assert bucket_for(131_072) == 131_072


def test_the_example_of_the_documentation():
    tokens, start = pad_batch([[5, 6], [7]], bucket=4)
    np.testing.assert_array_equal(tokens, [[0, 0, 5, 6], [0, 0, 0, 7]])
    np.testing.assert_array_equal(start, [2, 3])
    assert tokens.dtype == start.dtype == np.int32


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40), min_size=1, max_size=4))
def test_every_row_is_found_again_behind_its_start(rows):
    tokens, start = pad_batch(rows)
    assert tokens.shape == (len(rows), bucket_for(max(map(len, rows))))
    for row, padded, first in zip(rows, tokens, start, strict=True):
        assert padded[first:].tolist() == row and not padded[:first].any()


def test_rows_may_be_arrays():
    tokens, _ = pad_batch([np.array([1, 2], np.int64), np.array([3], np.uint16)], bucket=2)
    np.testing.assert_array_equal(tokens, [[1, 2], [0, 3]])


@pytest.mark.parametrize(
    ("rows", "bucket", "words"),
    [
        ([], None, "the batch is empty"),
        ([[1], [], [2]], None, "prompt 1 of the batch is empty"),
        ([[1.5]], None, "prompt 0 must be a list of token ids, got float64 [1]"),
        ([[1], [[2]]], None, "prompt 1 must be a list of token ids, got int64 [1, 1]"),
        ([3], None, "prompt 0 must be a list of token ids"),
        ([["a"]], None, "prompt 0 must be a list of token ids"),
        ([[True]], None, "prompt 0 must be a list of token ids, got bool [1]"),
        ([[1, 2, 3]], 2, "bucket 2 is smaller than the longest prompt (3 tokens)"),
        ([[1], [2, 2**32 + 5]], None, "4294967301"),
        ([[1], [[2], [3, 4]]], None, "prompt 1"),
    ],
)
def test_batches_that_cannot_be(rows, bucket, words):
    with pytest.raises(InputError) as error:
        pad_batch(rows, bucket)
    assert words in str(error.value)
