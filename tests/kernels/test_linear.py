"""Rows times matrices of a stack, and what happens around them: the kernels and the reference against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import jit

import kernels_pallas
from kernels_pallas import Norm
from kernels_pallas.linear import gpu, reference
from tolerances import of_product

EPS = 1e-5
TILES = gpu.Tiles(rows=4, out=8, inner=16, stages=2)  # small, so that several are crossed
REFERENCE = {name: jit(getattr(reference, name)) for name in ("linear", "projections", "gated")}
GPU = {
    "linear": jit(
        lambda x, weight, layer, bias, residual: gpu.products(
            x, None, (weight,), (bias,), residual, layer, interpret=True, tiles=TILES
        )[0]
    ),
    "projections": jit(
        lambda x, norm, weights, layer, biases: gpu.products(
            x, norm, weights, biases, None, layer, interpret=True, tiles=TILES
        )
    ),
    "gated": jit(lambda *given: gpu.gated(*given, interpret=True, tiles=TILES)),
}
every_implementation = pytest.mark.parametrize("implementation", [REFERENCE, GPU], ids=["reference", "gpu"])
at_the_edges_of_tiles = pytest.mark.parametrize(
    ("rows", "out", "inner", "dtype"),
    [
        (1, 8, 16, jnp.float32),
        (1, 40, 100, jnp.float32),
        (5, 7, 15, jnp.float32),
        (4, 9, 17, jnp.float32),
        (17, 33, 64, jnp.float32),
        (3, 48, 130, jnp.bfloat16),
        (1, 8, 32, jnp.float16),
    ],
)


def drawn(seed: int, dtype, *shapes: tuple[int, ...]) -> list[jax.Array]:
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def exact(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(a, np.float64) for a in arrays]


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)


def assert_near(ours: jax.Array, theirs: np.ndarray, tolerance, dtype, of_16_bits: float = 0.015) -> None:
    """float32: as far as sums can be; 16 bits: a share of the largest, as far as the operands' last bits go."""
    assert ours.dtype == dtype and ours.shape == theirs.shape
    tolerance = tolerance if dtype == jnp.float32 else of_16_bits * abs(theirs).max()
    np.testing.assert_array_less(abs(np.asarray(ours, np.float64) - theirs), tolerance)


@every_implementation
@at_the_edges_of_tiles
def test_a_product_with_bias_and_residual(implementation, rows, out, inner, dtype):
    x, weight, bias, residual = drawn(0, dtype, (rows, inner), (3, out, inner), (3, out), (rows, out))
    for layer, add in ((0, False), (2, True)):
        ours = implementation["linear"](x, weight, jnp.int32(layer), bias if add else None, residual if add else None)
        x64, w64, b64, r64 = exact(x, weight[layer], bias[layer], residual)
        theirs = x64 @ w64.T + (b64 + r64 if add else 0)
        assert_near(ours, theirs, of_product(x64, w64) + 2.0**-22 * (1 + abs(b64) + abs(r64)), dtype, 0.01)


@every_implementation
@at_the_edges_of_tiles
def test_projections_of_normed_rows(implementation, rows, out, inner, dtype):
    """Matrices of several heights, so that tiles of one end beside those of the next; a bias for some."""
    shapes = (rows, inner), (2, inner), (2, out, inner), (2, 3, inner), (2, out + 5, inner), (2, 3)
    x, norm, *weights, bias = drawn(1, dtype, *shapes)
    found = implementation["projections"](x, Norm(norm, EPS), tuple(weights), jnp.int32(1), (None, bias, None))
    x64, n64, b64 = exact(x, norm[1], bias[1])
    y = normed(x64, n64)
    for ours, weight, add in zip(found, weights, (0, b64, 0), strict=True):
        (w64,) = exact(weight[1])
        assert_near(ours, y @ w64.T + add, 4 * of_product(y, w64) + 1e-6, dtype)


@every_implementation
@at_the_edges_of_tiles
def test_the_gated_half_of_an_mlp(implementation, rows, out, inner, dtype):
    x, norm, gate, up = drawn(2, dtype, (rows, inner), (2, inner), (2, out, inner), (2, out, inner))
    ours = implementation["gated"](x, Norm(norm, EPS), gate, up, jnp.int32(1))
    x64, n64, g64, u64 = exact(x, norm[1], gate[1], up[1])
    y = normed(x64, n64)
    g, u = y @ g64.T, y @ u64.T
    wrong = 4 * (of_product(y, g64) * (1 + abs(u)) * 1.1 + of_product(y, u64) * abs(g)) + 1e-6  # silu' < 1.1
    assert_near(ours, g / (1 + np.exp(-g)) * u, wrong, dtype)


@given(rows=st.integers(1, 9), out=st.integers(1, 20), inner=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_kernel_and_reference_agree_for_every_shape(rows, out, inner, seed):
    x, norm, gate, up = drawn(seed, jnp.float32, (rows, inner), (1, inner), (1, out, inner), (1, out, inner))
    given = x, Norm(norm, EPS), gate, up, jnp.int32(0)
    np.testing.assert_allclose(GPU["gated"](*given), REFERENCE["gated"](*given), rtol=2e-4, atol=2e-5)


def test_the_tolerance_does_not_forgive_fewer_bits():
    """A product whose operands have lost the bits that TF32 drops is outside it."""
    x, weight = (np.random.default_rng(i).normal(size=(16, 130)).astype(np.float32) for i in (0, 1))
    dropped = (x.view(np.int32) & ~0x1FFF).view(np.float32)  # 13 of 23 bits
    exact = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    error = abs(np.asarray(dropped, np.float64) @ exact[1].T - exact[0] @ exact[1].T)
    assert (error > of_product(*exact)).mean() > 0.8


def test_other_layers_do_not_count():
    weight = jnp.stack([jnp.full((16, 16), jnp.nan), jnp.ones((16, 16))])
    ours = GPU["linear"](jnp.ones((2, 16)), weight, jnp.int32(1), None, None)
    np.testing.assert_array_equal(ours, np.full((2, 16), 16.0))


def test_half_precision_does_not_overflow_between_the_norm_and_its_weight():
    """A norm that scales rows of 60,000 down is no reason for infinity: 60,000 * 2 has no float16."""
    x, norm, weight = jnp.full((1, 32), 6e4, jnp.float16), jnp.full((1, 32), 2, jnp.float16), jnp.ones((1, 8, 32))
    run = jit(
        lambda: kernels_pallas.projections(
            x, Norm(norm, EPS), [weight.astype(jnp.float16)], jnp.int32(0), implementation="gpu", interpret=True
        )
    )
    np.testing.assert_array_equal(run()[0], np.full((1, 8), 64.0))


def test_many_rows_are_the_library_s():
    x, weight = jnp.ones((65, 16)), jnp.ones((2, 16, 16))
    run = jax.jit(lambda: kernels_pallas.linear(x, weight, jnp.int32(0), implementation="gpu"))
    np.testing.assert_array_equal(run(), np.full((65, 16), 16.0))


@pytest.mark.usefixtures("own_checks_only")
@pytest.mark.parametrize(
    ("x", "weight", "more"),
    [
        (np.ones((2, 3)), np.ones((1, 4, 5)), {}),
        (np.ones(3), np.ones((1, 4, 3)), {}),
        (np.ones((2, 3), np.float32), np.ones((1, 4, 3)), {}),
        (np.ones((2, 3)), np.ones((1, 4, 3)), {"bias": np.ones((1, 5))}),
        (np.ones((2, 3)), np.ones((1, 4, 3)), {"bias": np.ones((1, 3))}),
        (np.ones((2, 3)), np.ones((2, 4, 3)), {"bias": np.ones((1, 4))}),
        (np.ones((2, 3)), np.ones((1, 4, 3)), {"residual": np.ones((1, 4))}),
        (np.ones((2, 3)), np.ones((1, 4, 3)), {"residual": np.ones((2, 4), np.float32)}),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, more):
    with pytest.raises(ValueError, match="linear: float"):
        kernels_pallas.linear(x, weight, jnp.int32(0), **more)
    if not more:
        norm = Norm(np.ones((1, x.shape[-1]), x.dtype), EPS)
        with pytest.raises(ValueError, match="projections: float"):
            kernels_pallas.projections(x, norm, [weight], jnp.int32(0))
        with pytest.raises(ValueError, match="gated: float"):
            kernels_pallas.gated(x, norm, weight, weight, jnp.int32(0))


@pytest.mark.usefixtures("own_checks_only")
def test_a_gate_is_as_high_as_its_other_half_and_a_kernel_has_a_name():
    x, norm = jnp.ones((65, 3)), Norm(jnp.ones((1, 3)), EPS)
    with pytest.raises(ValueError, match=r"gated: a gate of \[1, 4, 3\] and \[1, 5, 3\]"):
        kernels_pallas.gated(x, norm, jnp.ones((1, 4, 3)), jnp.ones((1, 5, 3)), jnp.int32(0))
    with pytest.raises(ValueError, match="implementation must be"):
        kernels_pallas.linear(x, jnp.ones((1, 4, 3)), jnp.int32(0), implementation="gpus")
