"""`append` on a GPU: a program for each head, of queries, of keys, of values."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.gpu_backend import gpu_call, triton


def append(q, k, v, turn, buffers, used, layer, *, interpret=False):
    (batch, heads, _), kv_heads = q.shape, k.shape[1]
    given = layer.reshape(1), used.reshape(1), *turn, q, k, v, *buffers
    return gpu_call(
        _kernel,
        name="append",
        grid=(batch, heads + 2 * kv_heads),
        out_shape=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, *buffers)),
        warps=1,
        stages=1,
        aliases={7: 1, 8: 2},  # the buffers
        interpret=interpret,
    )(*given)


def _kernel(
    # Inputs
    layer_ref,  # [1]
    used_ref,  # [1]
    cos_ref,  # [B, D]
    sin_ref,  # [B, D]
    q_ref,  # [B, H, D]
    k_ref,  # [B, K, D]
    v_ref,  # [B, K, D]
    _k,  # the buffers, which are outputs at the same place
    _v,
    # Outputs
    turned_ref,  # [B, H, D]
    k_new_ref,  # [L, B, K, M, D]
    v_new_ref,  # [L, B, K, M, D]
):
    batch, program = pl.program_id(0), pl.program_id(1)
    (_, heads, dim), kv_heads = q_ref.shape, k_ref.shape[1]
    lane = jnp.arange(pl.next_power_of_2(dim))
    half = lane < dim // 2
    other = jnp.where(half, lane + dim // 2, lane - dim // 2)  # the lane it is rotated with
    real, used = lane < dim, used_ref[0]

    def load(ref, *at):
        return triton().load(ref.at[at], mask=real, other=0)

    def turned(ref, head):
        x, y = (load(ref, batch, head, at).astype(jnp.float32) for at in (lane, jnp.where(real, other, 0)))
        x = x * load(cos_ref, batch, lane) + jnp.where(half, -y, y) * load(sin_ref, batch, lane)
        return x.astype(ref.dtype)

    def write(ref, head, values):
        mask = real & (used < ref.shape[3])
        triton().store(ref.at[layer_ref[0], batch, head, used, lane], values, mask=mask)

    @pl.when(program < heads)
    def _():
        triton().store(turned_ref.at[batch, program, lane], turned(q_ref, program), mask=real)

    @pl.when((heads <= program) & (program < heads + kv_heads))
    def _():
        head = program - heads
        write(k_new_ref, head, turned(k_ref, head))

    @pl.when(heads + kv_heads <= program)
    def _():
        head = program - heads - kv_heads
        write(v_new_ref, head, load(v_ref, batch, head, lane))
