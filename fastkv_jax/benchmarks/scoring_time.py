"""What scoring and selection alone take of a prefill: the same shapes, rows drawn at random, nothing around them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastkv_jax.cache.select import choose
from fastkv_jax.methods import Layer, Method
from fastkv_jax.model import rope
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.ops import Ops
from fastkv_jax.model.platforms import full_precision
from fastkv_jax.prefilling.doors import prepare
from fastkv_jax.prefilling.layers import Rows, enter_budgets, keep
from fastkv_jax.prefilling.passes import reader_of, stages_of


def scorer(model: Llama, method: Method, prompts: np.ndarray) -> Callable[[], float]:
    """Compile what a method does beside the model itself for these prompts [B, n]; each call gives its seconds."""
    asked = prepare(model, prompts, method=method, max_new_tokens=0)
    prompt, static = asked.prompt, asked.static
    c, ops = model.config, Ops(static.kernels)
    batch, n = prompts.shape
    window = enter_budgets(model, prompt, static=static).window
    frequencies = jnp.asarray(rope.frequencies(c.rope, c.head_dim))
    drawn = jax.random.normal(jax.random.key(0), (batch, c.num_heads, n, c.head_dim), model.dtype)
    stages = stages_of(model, prompt, static)

    @jax.jit
    def run(drawn: Any) -> Any:
        found = []
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            rows = stage.width
            kept = jnp.full(batch, stage.kept[0, n], jnp.int32)
            places = Rows(
                jnp.broadcast_to(jnp.arange(rows), (batch, rows)),
                jnp.full(batch, rows - stage.tokens[n], jnp.int32),
                jnp.full(batch, rows, jnp.int32),
            )
            q = drawn[:, :, -rows:]

            def layer(carry, index, q=q, places=places, kept=kept, stage=stage):
                nothing = carry * 0  # each layer waits for the one before
                k = q[:, : c.num_kv_heads] + nothing
                seen = Layer(q, k, k, *places, window, kept, frequencies, model.layers.wo[...][0], ops)
                scores = method.scores(seen)
                entries = keep(seen, seen.protect(scores.kv), reader_of(method, stage)) if stage.compresses else None
                token_scores = seen.protect(scores.tokens)
                first = 0.0 if entries is None else entries.k.ravel()[0]
                return (jnp.nan_to_num(token_scores[0, -1]) + first).astype(drawn.dtype), (entries, token_scores)

            order = jnp.arange(stage.stop - stage.first)
            last, (entries, token_scores) = lax.scan(layer, jnp.zeros((), drawn.dtype), order)
            if following is not None and following.propagates:
                count = jnp.full((batch, 1), following.tokens[n], jnp.int32)
                last = last, choose(token_scores[-1][:, None], count, following.width, ops)
            found.append((last, entries))
        return found

    def seconds() -> float:
        began = time.perf_counter()
        with full_precision(static.platform, model.dtype):
            jax.block_until_ready(run(drawn))
        return time.perf_counter() - began

    seconds()  # compiles
    return seconds
