"""Rows go through a layer's MLP a block at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import model_a
from fastkv_jax.model import blockwise


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tokens", [258, 512, 700])
def test_blocks_of_rows_are_the_whole(tokens: int, parts: int, monkeypatch):
    block = model_a().layer(jnp.asarray(1))
    c = block.config
    x = jax.random.normal(jax.random.key(0), (2, tokens, c.hidden_size))
    attended = jax.random.normal(jax.random.key(1), (2, c.num_heads, tokens, c.head_dim))
    monkeypatch.setattr(blockwise, "_ROWS", 128)
    in_blocks = lambda x, attended: blockwise.by_blocks(block.output, x, attended, parts)  # noqa: E731
    assert "scan" in str(jax.make_jaxpr(in_blocks)(x, attended))
    np.testing.assert_allclose(in_blocks(x, attended), block.output(x, attended), rtol=0, atol=1e-5)
