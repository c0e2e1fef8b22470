"""Prefill attention against float64 NumPy, and its lowering for accelerators that are not here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import fastkv_jax.model.attention
from fastkv_jax.model.attention import _causal, attention
from fastkv_jax.model.platforms import cudnn_attends
from tolerances import ATTENTION, ATTENTION_BF16

run = jax.jit(partial(attention, platform="cpu"), static_argnames=("mesh",))
DIM = 16


def inputs(tokens: int, group: int, batch: int = 3):
    random = np.random.default_rng(tokens)
    shapes = [(batch, heads, tokens, DIM) for heads in (2 * group, 2, 2)]
    q, k, v = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    start = np.array([0, tokens // 3, tokens - 1], np.int32)[:batch]
    return q, k, v, start


def expected(q, k, v, start):
    """[B, H, T, D] in float64; zero in the rows before `start`, which no one may read."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group, out = q.shape[1] // k.shape[1], np.zeros(q.shape)
    for b, h in np.ndindex(q.shape[:2]):
        s = start[b]
        logits = q[b, h, s:] @ k[b, h // group, s:].T / np.sqrt(q.shape[-1])
        logits = np.where(np.tri(len(logits), dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out[b, h, s:] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, h // group, s:]
    return out


def valid(out, start):
    """The rows that count; all of them must be finite, padding too, for it stays in the residual stream."""
    out = np.asarray(out, np.float64)
    assert np.isfinite(out).all()
    return np.where((np.arange(out.shape[2]) >= start[:, None])[:, None, :, None], out, 0.0)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 512, 513, 1100])
def test_agrees_with_float64_for_ragged_rows(tokens: int, group: int):
    given = inputs(tokens, group)
    np.testing.assert_allclose(valid(run(*given), given[3]), expected(*given), rtol=0, atol=ATTENTION)


def test_rows_that_all_start_late_agree():
    q, k, v, _ = inputs(1100, 3)
    start = np.array([1023, 600, 1024], np.int32)
    np.testing.assert_allclose(valid(run(q, k, v, start), start), expected(q, k, v, start), rtol=0, atol=ATTENTION)


def test_left_padding_changes_nothing():
    q, k, v, start = inputs(513, 3)
    padded = [np.pad(x, ((0, 0), (0, 0), (587, 0), (0, 0)), constant_values=9.0) for x in (q, k, v)]
    wide = np.asarray(run(*padded, start + np.int32(587)))[:, :, 587:]
    np.testing.assert_allclose(valid(wide, start), valid(run(q, k, v, start), start), rtol=0, atol=ATTENTION)


def test_what_stands_in_the_padding_changes_nothing():
    q, k, v, start = inputs(513, 3)
    before = np.arange(513) < start[:, None]
    dirty = [np.where(before[:, None, :, None], np.float32(50.0), x) for x in (q, k, v)]
    np.testing.assert_array_equal(valid(run(*dirty, start), start), valid(run(q, k, v, start), start))


def test_large_logits_do_not_overflow():
    q, k, v, start = inputs(513, 3)
    q = q * np.float32(1e3)
    np.testing.assert_allclose(valid(run(q, k, v, start), start), expected(q, k, v, start), rtol=0, atol=2e-3)


@pytest.mark.parametrize("tokens", [7, 1100])
def test_bfloat16_is_near(tokens: int):
    q, k, v, start = inputs(tokens, 3)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out = run(q, k, v, start)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(valid(out, start), expected(q, k, v, start), rtol=0, atol=ATTENTION_BF16)


@pytest.mark.parametrize("tokens", [7, 1100])
def test_heads_spread_over_two_devices_change_nothing(tokens: int):
    given = inputs(tokens, 3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    spread = run(*given, mesh=mesh)
    assert len(spread.sharding.device_set) == 2
    np.testing.assert_allclose(spread, run(*given), rtol=0, atol=ATTENTION)


def lowered(platform: str, target: str, tokens: int, dim: int, *, batch: int = 2, dtype: str = "bfloat16") -> str:
    """StableHLO for an accelerator, made without one."""
    shapes = [jax.ShapeDtypeStruct((batch, heads, tokens, dim), dtype) for heads in (6, 2, 2)]
    start = jax.ShapeDtypeStruct((batch,), jnp.int32)
    traced = jax.jit(partial(attention, platform=platform)).trace(*shapes, start)
    return traced.lower(lowering_platforms=(target,)).as_text()


@pytest.mark.parametrize("tokens", [100, 512, 1280])
@pytest.mark.parametrize("dim", [64, 128])
def test_lowers_to_a_tpu_kernel(dim: int, tokens: int):
    assert "tpu_custom_call" in lowered("tpu", "tpu", tokens, dim)


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN itself needs a GPU; XLA's form of the same call takes its place, and like it may leave anything in the rows
    behind the lengths. It takes float32 too, which our numbers are in. Returns the shapes that were asked for.
    """
    theirs, asked = jax.nn.dot_product_attention, []

    def call(q, k, v, *, query_seq_lengths, implementation, **options):
        assert implementation == "cudnn" and options["is_causal"]
        asked.append(q.shape)
        out = theirs(q, k, v, query_seq_lengths=query_seq_lengths, implementation="xla", **options)
        behind = jnp.arange(q.shape[1])[None] >= query_seq_lengths[:, None]
        return jnp.where(behind[..., None, None], jnp.asarray(jnp.nan, out.dtype), out)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    monkeypatch.setattr(fastkv_jax.model.attention, "cudnn_attends", lambda dtype, dim: True)
    return asked


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_padding_and_cudnn_s_unwritten_rows_reach_no_one(cudnn, kv_heads: int, batch: int):
    q, k, v, start = inputs(100, kv_heads)
    q, k, v, start = (a[-batch:] for a in (q, k, v, start - np.int32(batch == 1) * 60))
    padding = (np.arange(100) < start[:, None])[:, None, :, None]
    dirty = (jnp.asarray(np.where(padding, np.float32(np.nan), a)) for a in (q, k, v))
    out = attention(*dirty, jnp.asarray(start), platform="gpu")
    np.testing.assert_allclose(valid(out, start), expected(q, k, v, start), rtol=0, atol=ATTENTION)
    np.testing.assert_array_equal(np.where(padding, out, 0), 0)
    assert cudnn == [(batch, 100, 2 * kv_heads, DIM)]


def test_one_row_is_not_gathered_for_cudnn(cudnn):
    text = lowered("gpu", "cuda", 100, DIM, batch=1, dtype="float32")
    assert "stablehlo.gather" not in text and text.count("stablehlo.dynamic_slice") == 4  # q, k, v and back


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 64), ("float32", 16), ("bfloat16", 20), ("float16", 136)])
def test_what_cudnn_refuses_runs_in_full_precision_on_a_gpu(dtype: str, dim: int):
    assert not cudnn_attends(dtype, dim)
    text = lowered("gpu", "cuda", 100, dim, dtype=dtype)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all(("HIGHEST" in line) == (dtype == "float32") for line in products)
    q, k, v, start = inputs(100, 3)
    own = attention(*map(jnp.asarray, (q, k, v, start)), platform="gpu")
    np.testing.assert_array_equal(own, run(q, k, v, start))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_what_cudnn_takes_is_its_own(monkeypatch, dtype: str, dim: int):
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, *_, implementation, **__: asked.append(implementation) or q
    )
    lowered("gpu", "cuda", 100, dim, dtype=dtype)
    assert asked == ["cudnn"]


def test_products_of_other_platforms_are_as_ever():
    assert "HIGHEST" not in lowered("cpu", "cpu", 100, 16, dtype="float32")


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("shards", [1, 2])
def test_splash_attention_sees_groups_and_padding_as_we_do(monkeypatch, kv_heads: int, shards: int):
    """Its kernel, interpreted on the CPU; also where each device has a part of the queries."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    real = splash_attention.make_splash_mha_single_device
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", partial(real, interpret=True))
    q, k, v, start = inputs(100 if shards == 1 else 256, kv_heads)
    mesh = None if shards == 1 else Mesh(np.array(jax.devices()[:shards]), ("sequence",))
    out = attention(*map(jnp.asarray, (q, k, v, start)), platform="tpu", mesh=mesh)
    np.testing.assert_allclose(valid(out, start), expected(q, k, v, start), rtol=0, atol=ATTENTION)


@pytest.mark.parametrize(
    ("rows", "blocks", "first"), [(1024, (256, 512), 0), (512, (512, 256), 512), (384, (128, 512), 640)]
)
def test_splash_attention_is_told_of_the_same_blocks_as_by_its_own_mask(rows: int, blocks: tuple[int, int], first: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import CausalMask, MultiHeadMask, splash_attention_mask_info

    masks = _causal((rows, 1024), first), CausalMask((rows, 1024), offset=first)
    found = [splash_attention_mask_info.process_mask(MultiHeadMask([mask]), blocks)[0] for mask in masks]
    jax.tree.map(np.testing.assert_array_equal, *found)
