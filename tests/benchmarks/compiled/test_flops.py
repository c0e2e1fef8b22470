"""Operations counted in XLA's text: products by their shapes, loops by their turns."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fastkv_jax.benchmarks.compiled.flops import flops


def count(run, *shapes) -> float:
    return flops(jax.jit(run).lower(*(jnp.zeros(shape) for shape in shapes)).compile().as_text())


def test_a_product_is_two_operations_for_each_pair():
    assert count(lambda a, b: a @ b, (30, 40), (40, 50)) == 2 * 30 * 40 * 50
    assert count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (3, 5, 7), (3, 9, 7)) == 2 * 3 * 5 * 7 * 9


def test_loops_within_loops_count_every_turn():
    def layers(x, w):
        rows = lambda i, x: lax.dynamic_update_slice(x, lax.dynamic_slice(x, (8 * i, 0), (8, 16)) @ w, (8 * i, 0))  # noqa: E731
        return lax.scan(lambda x, _: (lax.fori_loop(0, 4, rows, x), None), x, length=6)[0]

    assert count(layers, (32, 16), (16, 16)) == 6 * 4 * 2 * 8 * 16 * 16


def test_a_branch_counts_as_the_longer_one():
    def either(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count(either, (8, 16), (16, 16)) == 2 * 2 * 8 * 16 * 16


TPU = """
%turns (t: (s32[])) -> pred[] {
  %t = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%step (t: (s32[])) -> (s32[]) {
  %t = (s32[]) parameter(0)
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[4,16,32]{2,1,0} parameter(2)
  %y = bf16[64,4,16]{2,0,1} convolution(%x, %w), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_0oi->b0f
  %splash_mha.1 = (f32[8,128]{1,0}, bf16[2,100,16]{2,1,0}) custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %next = (s32[]) tuple(%t)
}

ENTRY %main (x: bf16[64,32]) -> (s32[]) {
  %zero = (s32[]) parameter(0)
  ROOT %loop = (s32[]) while(%zero), condition=%turns, body=%step
}
"""


def test_a_tpu_s_loops_convolutions_and_attention_kernel():
    text = TPU.replace("%x = bf16[64,32]{1,0:T(8,128)(2,1)}", "%x = bf16[64,1,32]{2,1,0}")
    product, attention = 2 * 64 * 32 * 4 * 16, 2 * 2 * 16 * 100 * 101
    assert flops(text) == pytest.approx(5 * (product + attention))
