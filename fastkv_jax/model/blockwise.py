"""What each row of a prompt goes through alone, a block of rows at a time: the peak of memory is a block's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

_ROWS = 2048  # eight times what an accelerator's matrix units need to outrun its memory


def by_blocks(
    of_rows: Callable[[Array, Array], Array], x: Float[Array, "B T E"], attended: Float[Array, "B H T D"], parts: int
) -> Float[Array, "B T E"]:
    """of_rows(x, attended), which must not let rows see each other; x is updated in place.

    T may be spread over devices in `parts` equal pieces, each with blocks of its own.
    """
    if parts > 1:
        mine = rearrange(x, "b (p t) e -> b p t e", p=parts), rearrange(attended, "b h (p t) d -> b h p t d", p=parts)
        each = jax.vmap(lambda x, attended: by_blocks(of_rows, x, attended, 1), in_axes=(1, 2), out_axes=1)
        return each(*mine).reshape(x.shape)
    tokens = x.shape[1]
    blocks = -(-tokens // _ROWS)
    if blocks <= 1:
        return of_rows(x, attended)
    rows = -(-tokens // (blocks * 128)) * 128

    def one_block(i, x):
        first = jnp.minimum(i * rows, tokens - rows)  # the last block begins in the one before it
        old = lax.dynamic_slice_in_dim(x, first, rows, axis=1)
        new = of_rows(old, lax.dynamic_slice_in_dim(attended, first, rows, axis=2))
        is_new = first + jnp.arange(rows) >= i * rows
        return lax.dynamic_update_slice_in_dim(x, jnp.where(is_new[:, None], new, old), first, axis=1)

    return lax.fori_loop(0, blocks, one_block, x)
