"""The specification of `append` in plain jax.numpy."""

import jax.numpy as jnp
from jax import lax

from kernels_pallas.arithmetic import rotate


def append(q, k, v, turn, buffers, used, layer):
    cos, sin = (a[:, None] for a in turn)
    k_new = _write(buffers[0], rotate(k, cos, sin), used, layer)
    return rotate(q, cos, sin), k_new, _write(buffers[1], v, used, layer)


def _write(buffer, entries, used, layer):
    """Where there is no such slot, the last one gets what it holds."""
    place, size = (layer, 0, 0, used, 0), (1, *buffer.shape[1:3], 1, buffer.shape[4])
    entries = entries[None, :, :, None]
    entries = jnp.where(used < buffer.shape[3], entries, lax.dynamic_slice(buffer, place, size))
    return lax.dynamic_update_slice(buffer, entries, place)
