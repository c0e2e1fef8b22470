"""Samplers against filters written in NumPy, and the ranges of their settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv_jax.decoding.sampling import Greedy, Sample
from fastkv_jax.errors import FastKVConfigError

VOCABULARY = 8


def allowed(logits, temperature, top_k, top_p, min_p):
    """The token ids that the filters let through, one row, float64: top-k, then top-p, then min-p."""
    probabilities = np.exp((logits - logits.max()) / temperature)
    falling = np.argsort(-probabilities)
    if top_k:
        falling = falling[:top_k]
    share = probabilities[falling] / probabilities[falling].sum()
    falling = falling[np.concatenate([[0.0], np.cumsum(share)[:-1]]) < top_p]
    return set(falling[probabilities[falling] >= min_p].tolist())


def drawn(sampler, logits, draws=400):
    """All tokens that come out for one row of logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    return set(np.asarray(sampler(rows, jax.random.key(0))).tolist())


@settings(max_examples=40, deadline=None)
@given(
    st.permutations(range(VOCABULARY)),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, VOCABULARY + 2),
    st.sampled_from([1e-6, 0.37, 0.731, 0.9, 1.0]),
    st.sampled_from([0.0, 0.111, 0.43, 1.0]),
)
def test_only_tokens_that_pass_the_filters_come_out(order, temperature, top_k, top_p, min_p):
    logits = np.array(order) * 0.37
    wanted = allowed(logits, temperature, top_k, top_p, min_p)
    found = drawn(Sample(temperature, top_p, top_k, min_p), logits)
    assert found <= wanted and int(logits.argmax()) in found


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.4), (4, 0.9, 0.2)])
def test_every_token_that_passes_comes_out(top_k, top_p, min_p):
    logits = np.linspace(0, 2, VOCABULARY)[::-1].copy()
    wanted = allowed(logits, 1.0, top_k, top_p, min_p)
    assert 1 < len(wanted) < VOCABULARY
    assert drawn(Sample(1.0, top_p, top_k, min_p), logits, 3000) == wanted


def test_frequencies_are_those_of_the_distribution():
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (20_000, 4))
    for temperature in (0.7, 1.5):
        tokens = np.asarray(Sample(temperature)(rows, jax.random.key(1)))
        wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / len(tokens), wanted, atol=0.015)


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals():
    tokens = Greedy()(jnp.array([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]]), jax.random.key(0))
    assert tokens.dtype == jnp.int32 and tokens.tolist() == [1, 0]


@pytest.mark.parametrize("sampler", [Sample(top_k=1), Sample(top_p=1e-9), Sample(min_p=1.0), Sample(temperature=1e-3)])
def test_each_filter_at_its_end_is_greedy(sampler):
    logits = jax.random.normal(jax.random.key(2), (50, 30))
    key = jax.random.key(3)
    np.testing.assert_array_equal(sampler(logits, key), Greedy()(logits, key))


@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 1e-45, 1e-300])
def test_the_lowest_temperatures_are_greedy(temperature):
    logits = jnp.array([[3.0, 5.0, 4.0], [-3.0, -4.0, -2.0], [1.0, -9.0, 0.0]])
    assert Sample(temperature)(logits, jax.random.key(0)).tolist() == [1, 2, 0]


def test_a_key_decides():
    logits = jnp.zeros((4, 100))
    first, again, other = (Sample()(logits, jax.random.key(seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.dtype == jnp.int32 and len(set(first.tolist())) > 1  # rows are independent


def test_samplers_are_static_arguments():
    assert Sample(1.0, 0.5) == Sample(1.0, 0.5) and hash(Sample(0.5)) == hash(Sample(0.5)) and Greedy() == Greedy()
    draw = jax.jit(lambda logits, key, sampler: sampler(logits, key), static_argnames="sampler")
    assert draw(jnp.zeros((2, 5)), jax.random.key(0), Sample(0.5, 0.9, 3, 0.1)).shape == (2,)


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("temperature", [0.0, -1.0, float("nan"), float("inf")], "temperature must be finite and > 0 to sample, got"),
        ("top_p", [0.0, -0.1, 1.1, float("nan")], "top_p must be in (0, 1], got"),
        ("top_k", [-1], "top_k must be >= 0 (0 = off), got"),
        ("min_p", [-0.1, 1.1, float("nan")], "min_p must be in [0, 1], got"),
    ],
)
def test_values_out_of_range_are_named(field, values, words):
    for value in values:
        with pytest.raises(FastKVConfigError) as error:
            Sample(**{field: value})
        assert str(error.value) == f"{words} {value}"
