"""The suite checks annotated shapes: a call that breaks them fails, whoever makes it."""

import jax.numpy as jnp
import jaxtyping
import pytest

from fastkv_jax.cache.select import choose
from fastkv_jax.model.rope import rotate
from kernels_pallas import window_scores


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (lambda: choose(jnp.zeros((2, 5)), jnp.zeros(2), 3), "count"),  # counts are integers
        (lambda: rotate(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 2))), "sin"),
        (lambda: window_scores(jnp.zeros((1, 2, 3, 8)), jnp.zeros((2, 1, 9, 8)), jnp.zeros(1, int), jnp.ones(1, int),
                               kernel_size=1, pooling="max"), "k"),
    ],
)  # fmt: skip
def test_a_wrong_shape_or_dtype_is_seen(run, named: str):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"typechecking parameter '{named}'"):
        run()
