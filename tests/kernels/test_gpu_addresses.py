"""How wide the GPU kernels' addresses are: every access to a large array, read off the Triton programs.

Nothing runs and nothing is allocated: kernels are lowered for shapes of up to 10^12 numbers.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import kernels_pallas as kp
from kernels_pallas import Norm, Slots, gpu_backend

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
HOPPER = AbstractMesh((1,), ("gpu",), (AxisType.Auto,), abstract_device=H100)
BF16, INT32 = jnp.bfloat16, jnp.int32
LAYERS = 32


class Access(NamedTuple):
    """One address computation of a kernel."""

    array: jax.ShapeDtypeStruct
    bits: int  # of the offset, in numbers, with a sign


def accesses(run, *given, monkeypatch, capsys) -> list[Access]:
    """Of all kernels that `run` calls, by what Pallas prints of them."""
    arrays: list[list[jax.ShapeDtypeStruct]] = []
    real = pallas.pallas_call

    def printing(kernel, **choice):
        inner = real(kernel, **choice, debug=True)

        def call(*operands):
            arrays.append([*jax.tree.leaves(operands), *jax.tree.leaves(choice["out_shape"])])
            return inner(*operands)

        return call

    monkeypatch.setattr(gpu_backend.pl, "pallas_call", printing)
    with use_abstract_mesh(HOPPER):
        jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",))
    monkeypatch.undo()
    programs = capsys.readouterr().out.split("The Triton module for pallas_call")[1:]
    assert len(programs) == len(arrays) > 0
    return [one for text, mine in zip(programs, arrays, strict=True) for one in read(text, mine)]


def read(text: str, arrays: list[jax.ShapeDtypeStruct]) -> list[Access]:
    """`tt.addptr %p, %o : ..., tensor<64x128xi32>`, where %p is an argument, or one spread over a tile."""
    spread = dict(re.findall(r"(%\w+) = tt\.splat (%arg\d+) : !tt\.ptr", text))
    found = []
    for pointer, bits in re.findall(r"tt\.addptr (%\w+), %\w+ : [^,]+, (?:tensor<[\dx]*x?)?i(\d+)", text):
        argument = spread.get(pointer, pointer)
        assert argument.startswith("%arg"), f"{pointer} is no argument's pointer"
        found.append(Access(arrays[int(argument.removeprefix("%arg"))], int(bits)))
    assert len(found) == text.count("tt.addptr"), "an access was not understood"
    return found


def assert_wide_enough(found: list[Access]) -> None:
    narrow = [one for one in found if one.array.size > 1 << (one.bits - 1)]
    assert not narrow, narrow
    assert any(one.array.size > 1 << 31 for one in found) == any(one.bits == 64 for one in found)


def shape(*sizes: int, dtype=BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture
def of(monkeypatch, capsys):
    return lambda run, *given: accesses(run, *given, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("tokens", [131_072, 1_048_576])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("cache", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("flat", [False, True])
def test_decode_attention_finds_every_entry_or_refuses(of, batch, tokens, cache, flat):
    """32 layers of 8 KV heads of size 128; 4,096 new tokens."""
    heads, capacity = (1, 8 * tokens) if flat else (8, tokens)
    entries, numbers = shape(LAYERS, batch, heads, capacity, 128, dtype=cache), (LAYERS, batch, heads, capacity)
    scale = None if cache == "bfloat16" else shape(*numbers)
    prompt = Slots(entries, entries, shape(*numbers, dtype=INT32), None, scale, scale)
    prompt = prompt._replace(heads=shape(*numbers, dtype=INT32)) if flat else prompt
    new = shape(LAYERS, batch, 8, 4096, 128)

    def run(q, prompt, k, v, filled, i, j):
        return kp.decode_attention(q, prompt, Slots(k, v), filled, (i, j), implementation="gpu")

    given = shape(batch, 32, 128), prompt, new, new, shape(batch, dtype=INT32), *[shape(dtype=INT32)] * 2
    if 1 << 31 < entries.size * entries.dtype.itemsize and entries.size <= 1 << 32 and entries.dtype.itemsize == 1:
        with pytest.raises(ValueError, match=r"decode_attention: .* has 4,294,967,296 elements; of one byte"):
            of(run, *given)
    else:
        assert_wide_enough(of(run, *given))


@pytest.mark.parametrize("elements", [(1 << 31) - 1, 1 << 31, (1 << 31) + 1, 1 << 32, (1 << 32) + 1])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_what_is_refused_is_what_would_not_be_found(elements: int, itemsize: int):
    """The lowering takes 64 bits beyond 2^32 bytes: only of one-byte numbers are there too many before."""
    wide = elements * itemsize > 1 << 32
    assert gpu_backend.fits_offsets(elements, itemsize) == (wide or elements <= 1 << 31)
    assert gpu_backend.fits_offsets(elements, itemsize) or itemsize == 1


@pytest.mark.parametrize("tokens", [131_072, 1_048_576])
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_window_scores_find_every_key(of, batch, tokens):
    def run(q, k, start, stop):
        return kp.window_scores(q, k, start, stop, kernel_size=7, pooling="max", implementation="gpu")

    q, k, row = shape(batch, 32, 8, 128), shape(batch, 8, tokens, 128), shape(batch, dtype=INT32)
    assert_wide_enough(of(run, q, k, row, row))


@pytest.mark.parametrize(("layers", "wide", "hidden"), [(32, 14_336, 4096), (80, 28_672, 8192)])
def test_products_find_every_weight(of, layers, wide, hidden):
    x, norm, matrix = shape(1, hidden), shape(layers, hidden), shape(layers, wide, hidden)
    layer = shape(dtype=INT32)
    assert_wide_enough(
        of(
            lambda x, n, g, u, i: kp.gated(x, Norm(n, 1e-5), g, u, i, implementation="gpu"),
            x,
            norm,
            matrix,
            matrix,
            layer,
        )
    )
    down = shape(layers, hidden, wide)
    assert_wide_enough(
        of(lambda y, w, i, x: kp.linear(y, w, i, residual=x, implementation="gpu"), shape(1, wide), down, layer, x)
    )
    assert_wide_enough(
        of(lambda x, n, w, i: kp.projections(x, Norm(n, 1e-5), [w, w], i, implementation="gpu"), x, norm, matrix, layer)
    )


@pytest.mark.parametrize(("batch", "slots"), [(1, 4096), (8, 131_072)])
def test_append_finds_every_slot(of, batch, slots):
    q, k, angle = shape(batch, 32, 128), shape(batch, 8, 128), shape(batch, 128, dtype=jnp.float32)
    buffer, number = shape(LAYERS, batch, 8, slots, 128), shape(dtype=INT32)

    def run(q, k, v, cos, sin, k_new, v_new, used, layer):
        return kp.append(q, k, v, (cos, sin), (k_new, v_new), used, layer, implementation="gpu")

    assert_wide_enough(of(run, q, k, k, angle, angle, buffer, buffer, number, number))


def test_an_access_that_is_too_narrow_is_seen():
    text = """
      %3 = tt.splat %arg0 : !tt.ptr<i8> -> tensor<64x128x!tt.ptr<i8>>
      %4 = tt.addptr %3, %9 : tensor<64x128x!tt.ptr<i8>>, tensor<64x128xi32>
      %5 = tt.addptr %arg1, %8 : !tt.ptr<i32>, i64
    """
    arrays = [shape(2, 1 << 31, dtype=jnp.int8), shape(4, dtype=INT32)]
    found = read(text, arrays)
    assert [math.log2(one.array.size) for one in found] == [32, 2] and [one.bits for one in found] == [32, 64]
    with pytest.raises(AssertionError):
        assert_wide_enough(found)
