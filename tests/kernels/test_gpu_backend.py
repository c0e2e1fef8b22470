"""The GPU kernels become Triton programs on any machine, and say so where jax has lost Triton."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import fastkv_jax as fk
import kernels_pallas
from examples import model_a
from fastkv_jax.decoding.loop import lower_decode
from fastkv_jax.decoding.step import decode
from kernels_pallas import Norm, Slots, gpu_backend

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
HOPPER = AbstractMesh((1,), ("gpu",), (AxisType.Auto,), abstract_device=H100)


def triton_calls(run, *given) -> int:
    """How many Triton kernels the program for an NVIDIA GPU holds; no GPU and no toolchain needed."""
    with use_abstract_mesh(HOPPER):
        lowered = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "tokens", "dim", "dtype"),
    [
        (32, 8, 8, 131_072, 128, jnp.bfloat16),  # Llama-3.1-8B
        (4, 1, 8, 131_072, 128, jnp.bfloat16),  # an eighth of it
        (9, 3, 16, 8192, 64, jnp.bfloat16),  # SmolLM2
        (8, 1, 64, 4096, 256, jnp.float32),
        (4, 2, 3, 5000, 80, jnp.float32),
    ],
)
def test_window_scores_are_lowered(heads, kv_heads, window, tokens, dim, dtype):
    run = functools.partial(kernels_pallas.window_scores, kernel_size=7, pooling="max", implementation="gpu")
    q = jax.ShapeDtypeStruct((1, heads, window, dim), dtype)
    k = jax.ShapeDtypeStruct((1, kv_heads, tokens, dim), dtype)
    edge = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert triton_calls(run, q, k, edge, edge) == 2


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(("out", "inner"), [(4096, 4096), (1024, 4096), (14_336, 4096), (4096, 14_336), (1536, 576)])
def test_products_are_lowered_to_one_kernel_each(rows: int, out: int, inner: int):
    x, weight = jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16), jax.ShapeDtypeStruct((32, out, inner), jnp.bfloat16)
    norm, layer = jax.ShapeDtypeStruct((32, inner), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.int32)
    residual = jax.ShapeDtypeStruct((rows, out), jnp.bfloat16)

    def linear(x, weight, layer, residual):
        return kernels_pallas.linear(x, weight, layer, residual=residual, implementation="gpu")

    def projections(x, norm, weight, layer):
        return kernels_pallas.projections(x, Norm(norm, 1e-5), [weight] * 3, layer, implementation="gpu")

    def gated(x, norm, weight, layer):
        return kernels_pallas.gated(x, Norm(norm, 1e-5), weight, weight, layer, implementation="gpu")

    assert triton_calls(linear, x, weight, layer, residual) == 1
    assert triton_calls(projections, x, norm, weight, layer) == triton_calls(gated, x, norm, weight, layer) == 1


def test_a_decode_step_is_seven_kernels_a_layer_that_read_weights_and_entries_where_they_are():
    """Of a loop over layers: three projections, what is appended, attention, its merge, and three products."""
    cache = fk.prefill(model_a(), [[1, 2, 3]], method=fk.FullKV(), max_new_tokens=4).cache
    run = functools.partial(decode, model_a(), jnp.zeros(1, jnp.int32), kernels="gpu")
    assert triton_calls(run, cache) == 7
    with use_abstract_mesh(HOPPER):
        text = jax.jit(run).trace(cache).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.dynamic_slice" not in text


def test_the_decode_loop_asks_nobody_whether_to_go_on():
    """No branch, and loops that count to a constant: XLA then knows their turns, and the host need not wait for any."""
    prompt = fk.prefill(model_a(), [[1, 2, 3]], method=fk.FullKV(), max_new_tokens=4)
    with use_abstract_mesh(HOPPER):
        lowered = lower_decode(model_a(), prompt.cache, "gpu", lambda a: a, lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "stablehlo.if" not in text and "stablehlo.case" not in text
    conditions = re.findall(r"stablehlo\.while.*?cond \{(.*?)stablehlo\.return (%\w+)", text, re.DOTALL)
    assert len(conditions) == 2
    for condition, answer in conditions:
        limit = re.search(rf"{answer} = stablehlo\.compare +LT, %\w+, (%\w+)", condition)
        assert limit and re.search(rf"{limit[1]} = stablehlo\.constant", condition), condition


@pytest.mark.parametrize(
    ("heads", "kv_heads", "cache_heads", "capacity", "dim", "dtype", "cache"),
    [
        (32, 8, 8, 12_544, 128, jnp.bfloat16, jnp.bfloat16),
        (32, 8, 8, 12_544, 128, jnp.bfloat16, jnp.int8),
        (32, 8, 32, 12_544, 128, jnp.bfloat16, jnp.float8_e4m3fn),
        (32, 8, 1, 100_352, 128, jnp.bfloat16, jnp.int8),
        (4, 1, 1, 12_544, 128, jnp.bfloat16, jnp.int8),
        (9, 3, 3, 1664, 64, jnp.bfloat16, jnp.bfloat16),
        (8, 8, 8, 300, 80, jnp.float32, jnp.float32),
        (4, 2, 2, 0, 256, jnp.float32, jnp.float32),
    ],
)
def test_decode_attention_is_lowered(heads, kv_heads, cache_heads, capacity, dim, dtype, cache):
    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    slots = cache_heads, capacity
    entries, decoded = array(*slots, dim, dtype=cache), array(kv_heads, 256, dim, dtype=dtype)
    scale = array(*slots, dtype=jnp.bfloat16) if jnp.dtype(cache).itemsize == 1 else None
    prompt = Slots(entries, entries, array(*slots), array(*slots) if cache_heads == 1 else None, scale, scale)
    run = functools.partial(kernels_pallas.decode_attention, implementation="gpu")
    given = array(heads, dim, dtype=dtype), prompt, Slots(decoded, decoded), array()
    assert triton_calls(run, *given) == 2  # and the merge


def test_without_triton_the_way_out_is_named(monkeypatch):
    import jax.experimental.pallas as pallas

    monkeypatch.delattr(pallas, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    with pytest.raises(NotImplementedError, match="use implementation='reference'"):
        gpu_backend.triton()


STRICT = """
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from kernels_pallas import linear

chip = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
shapes = ((1, 256), jnp.bfloat16), ((2, 128, 256), jnp.bfloat16), ((), jnp.int32)
with use_abstract_mesh(AbstractMesh((1,), ("gpu",), (AxisType.Auto,), abstract_device=chip)):
    traced = jax.jit(lambda *a: linear(*a, implementation="gpu")).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
"""


def test_kernels_are_lowered_where_every_warning_is_an_error():
    """From jax 0.11 on it announces at each lowering that Triton will go; a user can do nothing about that."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", STRICT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
