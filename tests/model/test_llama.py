"""The projections of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import model_a
from fastkv_jax.model import llama as model_module


@pytest.mark.parametrize("tokens", [129, 512, 700])
def test_blocks_of_rows_are_the_whole(tokens: int, monkeypatch):
    block = model_a().layer(jnp.asarray(1))
    c = block.config
    x = jax.random.normal(jax.random.key(0), (2, tokens, c.hidden_size))
    attended = jax.random.normal(jax.random.key(1), (2, c.num_heads, tokens, c.head_dim))
    whole = block.output(x, attended)
    monkeypatch.setattr(model_module, "_ROWS", 128)
    assert "scan" in str(jax.make_jaxpr(block.output)(x, attended))
    np.testing.assert_allclose(block.output(x, attended), whole, rtol=0, atol=1e-5)
