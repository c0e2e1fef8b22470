"""How likely a model finds given tokens after a cache: for perplexity and for answers that are known."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastkv_jax.cache.kv_cache import KVCache
from fastkv_jax.methods.full import FullKV
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.platforms import Platform, in_full_precision
from fastkv_jax.prefilling.doors import prepare
from fastkv_jax.prefilling.layers import Static
from fastkv_jax.prefilling.passes import Pass, layer_groups, stages_of
from fastkv_jax.prefilling.prompt import Prompt

ROWS = 256  # rows of logits at once: a vocabulary is wide


def next_token_scores(
    model: Llama, tokens: Any, start: Any = None, *, cache: KVCache, platform: Platform | None = None
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """For each token of a text that goes on from a cache: (its log-probability, the most likely token) in its place.

    tokens [B, T] left-padded, start [B]; the first token of a row follows the cache's last one, whose logits are not
    kept, so its column is 0 and -1, as in the padding. The text is seen in full and the cache stays as it is.
    """
    asked = prepare(model, tokens, start, method=FullKV(), max_new_tokens=0, cache=cache, platform=platform)
    return _scores(model, asked.prompt, cache.folded(), static=asked.static)


@partial(jax.jit, static_argnames=("static",))
@in_full_precision
def _scores(model: Llama, prompt: Prompt, past: KVCache, *, static: Static):
    on = Pass(model, prompt, past, static)
    for stage in stages_of(model, prompt, static):
        on.enter(stage._replace(capacity=0, compresses=True))  # nothing is kept
        for layers in layer_groups(stage, past):
            on.layers(layers)

    def one_row(row_and_next):
        row, following = row_and_next  # [E], []
        logits = model.logits(row[None])[0]
        return jax.nn.log_softmax(logits)[following], jnp.argmax(logits).astype(jnp.int32)

    batch, columns = prompt.tokens.shape
    rows, following = on.at.x[:, :-1].reshape(-1, on.at.x.shape[-1]), prompt.tokens[:, 1:].reshape(-1)
    found, best = (a.reshape(batch, columns - 1) for a in lax.map(one_row, (rows, following), batch_size=ROWS))
    known = jnp.arange(1, columns)[None] > prompt.start[:, None]
    pad = ((0, 0), (1, 0))
    return jnp.pad(jnp.where(known, found, 0.0), pad), jnp.pad(jnp.where(known, best, -1), pad, constant_values=-1)
