"""`select` on a GPU: the reference, but that a counting pass settles four bits of the threshold instead of one.

A pass over scores in the L2 cache is short beside the launches around it: 8 passes, none of which is a loop's, take the
place of 32 turns, and XLA puts them into the graph of the layer. A kernel of our own would need a row's scores in one
multiprocessor, 512 KiB for 131,072 of them, or would sweep them with one of 132.
"""

import jax.numpy as jnp

from kernels_pallas.select.reference import compact, marked, ordered_bits

_BITS = 4


def select(scores, count, capacity, *, interpret=False):
    return compact(among_best(scores, count), count, capacity)


def among_best(scores, count, *, interpret=False):
    keys = ordered_bits(scores)
    return marked(keys, _kth_largest(keys, count), count)


def _kth_largest(keys, count):
    """The largest t with at least `count` keys >= t, a digit a pass, from the highest: as many as are not too large."""
    threshold = jnp.zeros(keys.shape[:-1], jnp.uint32)
    for shift in range(32 - _BITS, -1, -_BITS):
        digits = jnp.arange(1, 1 << _BITS, dtype=jnp.uint32) << shift
        candidates = threshold[..., None] | digits.reshape((1,) * threshold.ndim + (-1,))
        enough = (keys[..., None, :] >= candidates[..., None]).sum(axis=-1, dtype=jnp.int32) >= count[..., None]
        threshold |= enough.sum(axis=-1, dtype=jnp.uint32) << shift
    return threshold
