"""What a GPU's host does for a program, counted in XLA's text."""

import jax
import jax.numpy as jnp
from jax import lax

from fastkv_jax.benchmarks.compiled.launches import Launches, launches

LOOPS = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cut (w: bf16[4,1024,1024], i: s32[]) -> bf16[1024,1024] {
  %w = bf16[4,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %piece = bf16[1,1024,1024]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %flat = bf16[1024,1024]{1,0} bitcast(%piece)
}

%turn (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %matrix = bf16[1024,1024]{1,0} fusion(%x, %i), kind=kLoop, calls=%cut
  %small = f32[8]{0} copy(%x)
  %call = f32[8]{0} custom-call(%small, %matrix), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %call)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: (s32[], f32[8]), large: f32[1024,1024]) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]{0}) parameter(0)
  %large = f32[1024,1024]{1,0} parameter(1)
  %copied = f32[1024,1024]{1,0} copy(%large)
  ROOT %loop = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%turn KNOWN
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"4"}}'


def test_loops_count_every_turn_and_small_copies_are_kernels_like_others():
    """A cut matrix and a copied argument are 2 and 4 MiB; the copy of eight numbers is not worth a word."""
    assert launches(LOOPS.replace(" KNOWN", KNOWN)) == Launches(kernels=13, inner=3, large_copies=5, host_trips=0)


def test_a_loop_of_unknown_length_asks_after_every_turn():
    assert launches(LOOPS.replace(" KNOWN", "")).host_trips == 4


def test_a_branch_is_a_question_and_counts_as_the_longer_side():
    text = LOOPS.replace(
        "ROOT %loop = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%turn KNOWN",
        "ROOT %either = (s32[], f32[8]{0}) conditional(%p, %x, %x), true_computation=%turn, false_computation=%add",
    )
    assert launches(text) == Launches(kernels=4, inner=0, large_copies=2, host_trips=1)


def test_real_programs_of_xla_are_understood():
    """Where this machine compiles for: a loop of eight turns whose length is a constant, and one that looks at data."""

    def counted(x):
        return lax.fori_loop(0, 8, lambda i, x: jnp.sin(x) @ x, x)

    def until(x):
        return lax.while_loop(lambda x: x[0, 0] < 9, lambda x: jnp.sin(x) @ x + 1, x)

    one, other = (jax.jit(run).lower(jnp.ones((64, 64))).compile().as_text() for run in (counted, until))
    assert launches(one).host_trips == 0 and launches(one).kernels >= 8
    assert launches(other).host_trips > 0
