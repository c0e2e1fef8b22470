"""Rows times a matrix of a stack: the kernel and the reference against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import jit

import kernels_pallas
from kernels_pallas.linear import gpu, reference
from tolerances import of_product

IMPLEMENTATIONS = {
    "reference": jit(reference.linear),
    "gpu": jit(lambda *given: gpu.linear(*given, interpret=True, tiles=gpu.Tiles(out=16, inner=16, splits=3))),
}
every_implementation = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))


@every_implementation
@pytest.mark.parametrize(
    ("rows", "out", "inner", "dtype"),
    [(1, 16, 16, jnp.float32), (1, 40, 100, jnp.float32), (17, 33, 64, jnp.float32), (3, 48, 130, jnp.bfloat16)],
)
def test_agrees_at_the_edges_of_tiles(implementation, rows, out, inner, dtype):
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(size=shape), dtype) for shape in ((rows, inner), (3, out, inner)))
    for layer in (0, 2):
        ours = IMPLEMENTATIONS[implementation](x, weight, jnp.int32(layer))
        assert ours.dtype == dtype and ours.shape == (rows, out)
        exact = np.asarray(x, np.float64), np.asarray(weight[layer], np.float64)
        theirs = exact[0] @ exact[1].T
        tolerance = of_product(*exact) if dtype == jnp.float32 else 0.01 * abs(theirs).max()
        np.testing.assert_array_less(abs(np.asarray(ours, np.float64) - theirs), tolerance)


def test_the_tolerance_does_not_forgive_fewer_bits():
    """A product whose operands have lost the bits that TF32 drops is outside it."""
    x, weight = (np.random.default_rng(i).normal(size=(16, 130)).astype(np.float32) for i in (0, 1))
    dropped = (x.view(np.int32) & ~0x1FFF).view(np.float32)  # 13 of 23 bits
    exact = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    error = abs(np.asarray(dropped, np.float64) @ exact[1].T - exact[0] @ exact[1].T)
    assert (error > of_product(*exact)).mean() > 0.8


def test_other_layers_do_not_count():
    weight = jnp.stack([jnp.full((16, 16), jnp.nan), jnp.ones((16, 16))])
    ours = IMPLEMENTATIONS["gpu"](jnp.ones((2, 16)), weight, jnp.int32(1))
    np.testing.assert_array_equal(ours, np.full((2, 16), 16.0))


def test_many_rows_are_the_library_s():
    x, weight = jnp.ones((65, 16)), jnp.ones((2, 16, 16))
    run = jax.jit(lambda: kernels_pallas.linear(x, weight, jnp.int32(0), implementation="gpu"))
    np.testing.assert_array_equal(run(), np.full((65, 16), 16.0))


@pytest.mark.usefixtures("own_checks_only")
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (np.ones((2, 3)), np.ones((1, 4, 5))),
        (np.ones(3), np.ones((1, 4, 3))),
        (np.ones((2, 3), np.float32), np.ones((1, 4, 3))),
    ],
)
def test_what_does_not_fit_is_refused(x, weight):
    with pytest.raises(ValueError, match="linear: float"):
        kernels_pallas.linear(x, weight, jnp.int32(0))
