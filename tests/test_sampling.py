"""Samplers choose among exactly the tokens their filters let through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.sampling import Greedy, Sample


def test_greedy_takes_the_likeliest_and_the_lowest_id_on_ties():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    assert Greedy()(logits, jax.random.key(0)).tolist() == [1, 0]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8, unique=True),
    st.sampled_from((0, 1, 3, 8, 20)),
    st.sampled_from((0.1, 0.5, 0.9, 1.0)),
    st.sampled_from((0.0, 0.1, 0.9)),
)
def test_only_tokens_that_pass_the_filters_are_drawn(values, top_k, top_p, min_p):
    logits = np.array(values, np.float64) / 0.7
    order = np.argsort(-logits)
    allowed = list(order[: top_k or 8])
    mass = np.exp(logits[allowed]) / np.exp(logits[allowed]).sum()
    before = np.cumsum(mass) - mass
    sure = [token for token, b in zip(allowed, before, strict=True) if b < top_p + 1e-5]
    best = np.exp(logits - logits.max())
    sure = {int(token) for token in sure if best[token] >= min_p * (1 - 1e-5)}
    sampler = Sample(0.7, top_p, top_k, min_p)
    drawn = sampler(jnp.tile(jnp.array([values], jnp.float32), (400, 1)), jax.random.key(1))
    assert set(drawn.tolist()) <= sure and int(order[0]) in sure


def test_a_key_makes_draws_reproducible():
    logits = jnp.zeros((16, 50))
    first, again, other = (Sample()(logits, jax.random.key(key)).tolist() for key in (1, 1, 2))
    assert first == again != other


def test_frequencies_follow_the_distribution():
    logits = jnp.tile(jnp.log(jnp.array([[0.1, 0.2, 0.7]])), (4000, 1))
    drawn = np.bincount(Sample()(logits, jax.random.key(0)), minlength=3) / 4000
    assert np.allclose(drawn, [0.1, 0.2, 0.7], atol=0.03)


@pytest.mark.parametrize(
    "values",
    (
        {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"top_k": -1}, {"min_p": -0.1}, {"min_p": 1.1},
    ),
)  # fmt: skip
def test_values_out_of_range_are_named(values):
    ((name, value),) = values.items()
    with pytest.raises(FastKVConfigError, match=f"{name} must be .*got {value}"):
        Sample(**values)
