"""One full pass per sample: where every setting would let the answer's tokens through, after every layer."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastkv_jax.calibration.runs import Run, is_right, last_hidden
from fastkv_jax.calibration.samples import Sample
from fastkv_jax.methods import FastKV, FullKV
from fastkv_jax.methods.plan import effective_budgets
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.ops import Ops
from fastkv_jax.model.platforms import in_full_precision
from fastkv_jax.prefilling.layers import Progress, Static, observe, turns


class Survey(NamedTuple):
    """One sample with the full context, seen through every setting."""

    hidden: Float[np.ndarray, " E"]
    right: bool
    propagated: Float[np.ndarray, "M L"]  # shares of the answer's tokens, NaN without an answer in the prompt
    mean: Float[np.ndarray, "M L"]
    best: Float[np.ndarray, "M L"]
    overlap: Float[np.ndarray, "M L L"]


def survey(run: Run, sample: Sample, methods: tuple[FastKV, ...]) -> Survey:
    """Run it a layer at a time, and look at each layer's rows as every method would."""
    model, num_layers, n = run.model, run.model.config.num_layers, len(sample.token_ids)
    on, (stage,) = run.begun(sample, FullKV())
    on.enter(stage)
    plans = [effective_budgets(method, n, sample.window_end, num_layers) for method in methods]
    tokens = np.array([plan[-1].tokens for plan in plans], np.int32)
    kept = np.array([plan[0].kept for plan in plans], np.int32)
    first, stop = sample.span or (0, 0)
    answer = np.zeros(run.answer_slots, np.int32)
    answer[: stop - first] = on.prompt.tokens.shape[1] - n + np.arange(first, stop)
    passed, heads = [], []
    for i in range(num_layers):
        rows, entries = _look(model, on.at, np.int32(i), tokens, kept, answer, methods=methods, static=on.static)
        passed.append(np.asarray(rows)[:, -n:])
        heads.append(np.asarray(entries)[..., : stop - first])
        on.layers([i])
    on.join()
    result = on.finish()
    passed, heads = np.stack(passed, axis=1), np.stack(heads, axis=1)  # [M, L, n], [M, L, K, A]
    fixed = np.array([min(n, method.window_size + sample.window_end) for method in methods])
    if sample.span is None:
        propagated = mean = best = np.full(passed.shape[:2], np.nan)
    else:
        propagated = passed[:, :, first:stop].mean(axis=2)
        mean, best = heads.mean(axis=(2, 3)), heads.mean(axis=3).max(axis=2)
    hidden = np.asarray(last_hidden(model, on.at.x))
    return Survey(hidden, is_right(run, result, sample), propagated, mean, best, _agreement(passed, fixed))


@partial(jax.jit, static_argnames=("methods", "static"))
@in_full_precision
def _look(
    model: Llama, at: Progress, index, tokens, kept, answer, *, methods: tuple[FastKV, ...], static: Static
) -> tuple[Bool[Array, "M S"], Bool[Array, "M K A"]]:
    """What each method (budgets tokens, kept [M]) would choose of the rows that enter a layer, as it would itself:
    rows that go on, and which of the columns `answer` [A] each KV head keeps."""
    ops = Ops(static.kernels, model.mesh)
    layer = observe(model, index, at.x, at.rows, turns(model, at.rows.positions), ops)
    rows, heads = [], []
    for method, rows_out, entries in zip(methods, tokens, kept, strict=True):
        seen = layer._replace(window=jnp.full_like(layer.window, method.window_size), kept=entries[None])
        scores = method.scores(seen)
        rows.append(ops.among_best(seen.protect(scores.tokens)[:, None], rows_out[None, None])[0, 0])
        kv = seen.protect(scores.kv)
        heads.append(ops.among_best(kv, jnp.broadcast_to(entries, kv.shape[:2]))[0][:, answer])
    return jnp.stack(rows), jnp.stack(heads)


def _agreement(passed: Bool[np.ndarray, "M L n"], fixed: Int[np.ndarray, " M"]) -> Float[np.ndarray, "M L L"]:
    """The share of tokens that two layers have in common, without the `fixed` ones that all have; 1 if none."""
    marks, fixed = passed.astype(np.float32), fixed[:, None, None]
    common = np.einsum("min,mjn->mij", marks, marks, optimize=True) - fixed
    chosen = marks.sum(axis=2).max(axis=1)[:, None, None] - fixed
    return np.where(chosen > 0, common / np.maximum(chosen, 1), 1.0)
