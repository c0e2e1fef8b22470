"""The specification of `select`: the k-th largest value by bisection on its bits, then compaction by a running count.

A sort of 131,072 scores costs a TPU minutes to compile; 32 counting passes cost nothing and are as exact.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

_SIGN = np.uint32(0x80000000)


def select(scores, count, capacity):
    return compact(among_best(scores, count), count, capacity)


def among_best(scores, count):
    keys = ordered_bits(scores)
    return marked(keys, _kth_largest(keys, count), count)


def marked(keys, threshold, count):
    """The keys above the threshold, and of those at it the first, `count` together."""
    above, tied = keys > threshold[..., None], keys == threshold[..., None]
    missing = count - above.sum(axis=-1, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= missing[..., None]))


def ordered_bits(x):
    """uint32 keys in the order of the floats: flip the sign bit of positives, every bit of negatives; -0 equals 0."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(bits == _SIGN, jnp.uint32(0), bits)  # -0; adding 0 would do, but XLA drops that
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _kth_largest(keys, count):
    """The largest t with at least `count` keys >= t, one bit a pass, from the highest."""

    def refine(i, t):
        candidate = t | (_SIGN >> i.astype(jnp.uint32))
        enough = (keys >= candidate[..., None]).sum(axis=-1, dtype=jnp.int32) >= count
        return jnp.where(enough, candidate, t)

    return lax.fori_loop(0, 32, refine, jnp.zeros(keys.shape[:-1], jnp.uint32))


def compact(chosen, count, capacity):
    """chosen  0 1 0 1 1, count 3, capacity 4   ->   slots  . 1 2 3   ->   -1 1 3 4"""
    slots = (capacity - count)[..., None] + jnp.cumsum(chosen, axis=-1, dtype=jnp.int32) - 1
    slots = jnp.where(chosen, slots, capacity).reshape(-1, chosen.shape[-1])  # `capacity` is out of range: dropped
    columns = jnp.broadcast_to(jnp.arange(chosen.shape[-1], dtype=jnp.int32), slots.shape)
    rows = jnp.arange(slots.shape[0])[:, None]
    empty = jnp.full((slots.shape[0], capacity), -1, jnp.int32)
    return empty.at[rows, slots].set(columns, mode="drop").reshape(*chosen.shape[:-1], capacity)
