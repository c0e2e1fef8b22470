"""What a decode step writes: every implementation against NumPy, and that nothing else changes."""

import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import jit

import kernels_pallas
from kernels_pallas.append import gpu, reference

IMPLEMENTATIONS = {
    "reference": jit(reference.append),
    "gpu": jit(lambda *given: gpu.append(*given, interpret=True)),
}
every_implementation = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
LAYERS, BATCH, SLOTS = 3, 2, 5


def drawn(heads: int, kv_heads: int, dim: int, dtype):
    random = np.random.default_rng(dim)
    shapes = [(BATCH, n, dim) for n in (heads, kv_heads, kv_heads)] + [(LAYERS, BATCH, kv_heads, SLOTS, dim)] * 2
    q, k, v, *buffers = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    theta = np.tile(random.normal(size=(BATCH, dim // 2)), 2)
    return (q, k, v), (jnp.asarray(np.cos(theta), jnp.float32), jnp.asarray(np.sin(theta), jnp.float32)), buffers


def rotated(x, turn):
    """Pair (d, d + D/2) as a complex number, turned."""
    cos, sin = (np.asarray(a, np.float64)[:, None] for a in turn)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    half = first.shape[-1]
    turned = (first + 1j * second) * (cos + 1j * sin)[..., :half]
    return np.concatenate([turned.real, turned.imag], axis=-1)


@every_implementation
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (3, 3, 16), (8, 1, 80), (9, 3, 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("used", [0, 3, SLOTS - 1])
def test_queries_are_rotated_and_one_slot_of_one_layer_is_written(implementation, heads, kv_heads, dim, dtype, used):
    (q, k, v), turn, buffers = drawn(heads, kv_heads, dim, dtype)
    given = q, k, v, turn, tuple(buffers), jnp.int32(used), jnp.int32(1)
    turned, k_new, v_new = IMPLEMENTATIONS[implementation](*given)
    assert turned.dtype == k_new.dtype == v_new.dtype == dtype
    near = {"rtol": 0, "atol": 2e-6 if dtype == jnp.float32 else 2e-2}
    np.testing.assert_allclose(np.asarray(turned, np.float64), rotated(q, turn), **near)
    np.testing.assert_allclose(np.asarray(k_new[1, :, :, used], np.float64), rotated(k, turn), **near)
    np.testing.assert_array_equal(v_new[1, :, :, used], v)
    for new, old in zip((k_new, v_new), buffers, strict=True):
        kept = np.ones(old.shape, bool)
        kept[1, :, :, used] = False
        np.testing.assert_array_equal(np.asarray(new)[kept], np.asarray(old)[kept])


@every_implementation
@pytest.mark.parametrize("used", [SLOTS, SLOTS + 3])
def test_behind_the_last_slot_nothing_is_written(implementation, used):
    (q, k, v), turn, buffers = drawn(4, 2, 8, jnp.float32)
    _, *new = IMPLEMENTATIONS[implementation](q, k, v, turn, tuple(buffers), jnp.int32(used), jnp.int32(2))
    for mine, old in zip(new, buffers, strict=True):
        np.testing.assert_array_equal(mine, old)


@pytest.mark.usefixtures("own_checks_only")
@pytest.mark.parametrize("wrong", ["k", "buffers", "turn", "odd", "slots", "group"])
def test_what_does_not_fit_is_refused(wrong):
    (q, k, v), turn, buffers = drawn(4, 2, 8, jnp.float32)
    if wrong == "k":
        k = k[:, :1]
    elif wrong == "buffers":
        buffers = [buffer.astype(jnp.bfloat16) for buffer in buffers]
    elif wrong == "slots":
        buffers = [buffer[:, :, :, :0] for buffer in buffers]
    elif wrong == "group":
        q = q[:, :3]
    elif wrong == "turn":
        turn = turn[0][:, :4], turn[1]
    else:
        q, k, v, turn, buffers = (
            q[..., :7], k[..., :7], v[..., :7], tuple(a[:, :7] for a in turn), [b[..., :7] for b in buffers]
        )  # fmt: skip
    with pytest.raises(ValueError, match="append: float32"):
        kernels_pallas.append(q, k, v, turn, tuple(buffers), jnp.int32(0), jnp.int32(0))
