"""How likely a model finds given tokens after a cache: for perplexity and for answers that are known."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastkv_jax.attention import Platform
from fastkv_jax.cache import KVCache
from fastkv_jax.inference import check_prompt, platform_of
from fastkv_jax.inputs import Prompt
from fastkv_jax.methods.full import FullKV
from fastkv_jax.model import Llama
from fastkv_jax.stages import Static, enter, layer_groups, run_layers, shape_of, stages_of

ROWS = 256  # rows of logits at once: a vocabulary is wide


def next_token_scores(
    model: Llama, tokens: Any, start: Any = None, *, cache: KVCache, platform: Platform | None = None
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """For each token of a text that goes on from a cache: (its log-probability, the most likely token) in its place.

    tokens [B, T] left-padded, start [B]; the first token of a row follows the cache's last one, whose logits are not
    kept, so its column is 0 and -1, as in the padding. The text is seen in full and the cache stays as it is.
    """
    prompt = check_prompt(model, tokens, start, 0, FullKV(), 0, cache)
    return _scores(model, prompt, cache.folded(), static=Static(FullKV(), 0, 0, platform or platform_of(model)))


@partial(jax.jit, static_argnames=("static",))
def _scores(model: Llama, prompt: Prompt, past: KVCache, *, static: Static):
    at = enter(model, prompt, past, static=static)
    for stage in stages_of(model, prompt, static):
        n = jnp.asarray(stage.kept)[:, prompt.tokens.shape[1] - prompt.start]
        for layers, entries in layer_groups(stage, past, None):
            at, _ = run_layers(model, at, n, layers, entries, stage=shape_of(stage)._replace(capacity=0), static=static)

    def one_row(row_and_next):
        row, following = row_and_next  # [E], []
        logits = model.logits(row[None])[0]
        return jax.nn.log_softmax(logits)[following], jnp.argmax(logits).astype(jnp.int32)

    batch, columns = prompt.tokens.shape
    rows, following = at.x[:, :-1].reshape(-1, at.x.shape[-1]), prompt.tokens[:, 1:].reshape(-1)
    found, best = (a.reshape(batch, columns - 1) for a in lax.map(one_row, (rows, following), batch_size=ROWS))
    known = jnp.arange(1, columns) > prompt.start[:, None]
    pad = ((0, 0), (1, 0))
    return jnp.pad(jnp.where(known, found, 0.0), pad), jnp.pad(jnp.where(known, best, -1), pad, constant_values=-1)
