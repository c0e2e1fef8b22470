"""Choosing FastKV's TSP layer, window and kernel for a model by measuring on the user's own questions.

    survey   one full pass per sample: where every setting would let the answer's tokens through, after every layer
    trials   for the settings that promise most, one pass per sample that branches off after each candidate layer:

             layers 0 ... 8 ─┬─ 9 ─┬─ 10 ─┬─ ...            all tokens
                             └─ 9  └─ 10  └─ 11 ... 29      a fifth of them, then the answer is decoded

Layers are run one at a time through the programs of `stages`, so that no layer and no candidate compiles anything new.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastkv_jax import text
from fastkv_jax.buckets import pad_batch, round_up
from fastkv_jax.calibration.result import Calibration, Setting, best_answering, earliest_close
from fastkv_jax.chat_template import Rendering
from fastkv_jax.costs import layer_flops
from fastkv_jax.decoding.loop import decode_chunks
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.methods import FastKV, FullKV
from fastkv_jax.methods.base import Method
from fastkv_jax.methods.budgets import check_int
from fastkv_jax.methods.plan import Stage, effective_budgets
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.llama import Llama, rms_norm
from fastkv_jax.model.ops import Ops
from fastkv_jax.model.platforms import Kernels, Platform
from fastkv_jax.prefilling.doors import Prepared, prepare
from fastkv_jax.prefilling.layers import Prefill, Progress, observe, turns
from fastkv_jax.prefilling.passes import Pass, stages_of

ANSWER_TILE = 8  # answers up to so many tokens longer share a compilation
REPEATS = 3  # timed prefills of each kind


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A question with the answer expected.

    token_ids   the prompt, chat template included
    window_end  how many of them follow the question
    answer      token ids of the answer; empty if there is none
    """

    token_ids: tuple[int, ...]
    window_end: int = 0
    answer: tuple[int, ...] = ()

    @property
    def span(self) -> tuple[int, int] | None:
        """Where the answer stands in the prompt, [first, stop): its longest run there, None below half of it."""
        first, length = longest_run(self.token_ids, self.answer)
        return (first, first + length) if 2 * length >= max(len(self.answer), 1) else None


def longest_run(ids: Sequence[int], wanted: Sequence[int]) -> tuple[int, int]:
    """(first index, length) of the longest run of `ids` that is also a run of `wanted`; the first of several."""
    array, best = np.asarray(ids), (0, 0)
    runs = np.zeros(array.size + 1, np.int64)  # of tokens equal up to here, index shifted by one
    for token in wanted:
        runs[1:] = np.where(array == token, runs[:-1] + 1, 0)
        last = int(np.argmax(runs))
        best = max(best, (last - int(runs[last]), int(runs[last])), key=lambda run: (run[1], -run[0]))
    return best


def make_samples(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    rendering: Rendering = Rendering(),  # noqa: B008 - a frozen value
) -> list[Sample]:
    """Samples from rows with a prompt, an answer, and optionally the beginning of the answer as prefill.

    Through the chat template, told what `rendering` says, if there is one. An answer is tokenised as it stands in the
    prompt: with a space before it, where that finds more of it there. Raises `InputError` that names the row and the
    field.
    """
    samples = []
    for number, row in enumerate(rows, 1):
        for name in ("prompt", "answer"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(f"row {number}: {name} must be a text, found {row.get(name)!r}")
        if not isinstance(row.get("prefill"), str | None):
            raise InputError(f"row {number}: prefill must be a text, found {row['prefill']!r}")
        if text.has_chat_template(tokenizer):
            encoded = text.encode_chat(tokenizer, row["prompt"], prefill=row.get("prefill"), rendering=rendering)
        else:
            encoded = text.encode_raw(tokenizer, row["prompt"] + (row.get("prefill") or ""))
        samples.append(
            Sample(tuple(encoded.token_ids), encoded.window_end, _answer_ids(tokenizer, encoded, row["answer"]))
        )
    return samples


def _answer_ids(tokenizer: Any, prompt: text.EncodedPrompt, answer: str) -> tuple[int, ...]:
    ways = [tokenizer(space + answer.strip(), add_special_tokens=False)["input_ids"] for space in ("", " ")]
    return tuple(max(ways, key=lambda ids: longest_run(prompt.token_ids, ids)[1] / len(ids)))


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """What all passes share."""

    model: Llama
    platform: Platform
    max_new_tokens: int
    tokenizer: Any
    answer_slots: int  # the longest answer, rounded up

    def prepared(self, sample: Sample, method: Method) -> Prepared:
        return prepare(
            self.model, *pad_batch([sample.token_ids]), method=method, max_new_tokens=self.max_new_tokens,
            window_end=sample.window_end, platform=self.platform,
        )  # fmt: skip

    def begun(self, sample: Sample, method: Method) -> tuple[Pass, list[Stage]]:
        asked = self.prepared(sample, method)
        on = Pass(self.model, asked.prompt, None, asked.static)
        return on, stages_of(self.model, asked.prompt, asked.static)


def calibrate(
    model: Llama,
    samples: Iterable[Sample],
    *,
    name: str = "",
    layers: Iterable[int] | None = None,
    window_sizes: Iterable[int] = (8, 16, 32),
    kernel_sizes: Iterable[int] = (7, 13, 21, 31),
    poolings: Iterable[str] = ("max",),
    tsp_rate: float = 0.2,
    retention_rate: float = 0.2,
    tolerance: float = 0.1,
    finalists: int = 3,
    max_new_tokens: int = 24,
    tokenizer: Any = None,
    timed: bool = False,
    platform: Platform | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Calibration:
    """Measure and choose: the earliest TSP layer, then the smallest kernel and window, that answers like full context,
    or the most; see `best_answering`.

    name            of the model, for the report
    layers          candidates for the TSP layer, the last one being the paper's L_max; None: a quarter of the model to
                    three quarters. All combinations of window_sizes, kernel_sizes and poolings are surveyed.
    tsp_rate, retention_rate    as in `FastKV`; they are given, not searched: they say what the user wants to save
    tolerance       how much larger than the smallest a distance may be to count as close, >= 0 (eq. 3)
    finalists       how many of the settings are tried in earnest, those that promise most
    max_new_tokens  tokens decoded to look for the answer in
    tokenizer       to compare answers as text; None compares token ids, which a space before the answer may change
    timed           also time the prefill, full and chosen in turns
    progress        called with (steps done, steps in all)

    Where the samples have no answers there is nothing to count: give one setting, and eq. 3 chooses the layer. It does
    so too where no answer came out, with the full context or without it: better questions would help more.
    Raises `FastKVConfigError` or `InputError` before anything runs.

    >>> import fastkv_jax as fk
    >>> from fastkv_jax.calibration.measuring import make_samples
    >>> model, tokenizer = fk.load_model("smollm2-135m", dtype="float32"), fk.load_tokenizer("smollm2-135m")
    >>> row = {"prompt": "The code is 4711. " + "Boats go out. " * 20 + "What is the code?", "answer": "4711"}
    >>> samples = make_samples(tokenizer, [row])
    >>> found = fk.calibrate(model, samples, layers=[10, 14], window_sizes=[8], kernel_sizes=[7], max_new_tokens=8)
    >>> found.layers, found.right.shape
    ((10, 14), (1, 2))
    >>> method = found.method()
    """
    samples, c = tuple(samples), model.config
    rates = {"tsp_rate": tsp_rate, "retention_rate": retention_rate}
    candidates = _middle(c.num_layers) if layers is None else tuple(sorted(set(layers)))
    grid = dict.fromkeys(Setting(*one) for one in product(window_sizes, kernel_sizes, poolings))
    settings = tuple(sorted(grid, key=lambda setting: setting.cost))
    methods = tuple(FastKV(tsp_layer=0, **rates, **setting._asdict()) for setting in settings)
    _check_numbers(tolerance, finalists, max_new_tokens)
    _check_candidates(settings, candidates, samples, c.num_layers)
    slots = round_up(max(len(sample.answer) for sample in samples) or 1, ANSWER_TILE)
    run = _Run(model, platform or model.platform, max_new_tokens, tokenizer, slots)
    _check_prompts(run, samples)

    finalists = min(finalists, len(settings))
    total, done = len(samples) * (1 + finalists * len(candidates)), 0

    def counted(results: Iterable[Any]) -> Iterable[Any]:
        nonlocal done
        for result in results:
            done += 1
            progress(done, total)
            yield result

    surveys: list[_Survey] = list(counted(_survey(run, sample, methods) for sample in samples))
    propagated = _mean([survey.propagated for survey in surveys])
    kept_mean, kept_best = _mean([survey.mean for survey in surveys]), _mean([survey.best for survey in surveys])
    tried = _most_promising(propagated, kept_best, candidates)[:finalists]
    distances = np.zeros((len(samples), finalists, len(candidates)))
    right = np.zeros((finalists, len(candidates)), np.int64)
    for (i, sample), (f, place) in product(enumerate(samples), enumerate(tried)):
        trials: list[_Trial] = list(counted(_trials(run, sample, methods[place], candidates)))
        distances[i, f] = [_distance(trial.hidden, surveys[i].hidden) for trial in trials]
        right[f] += [trial.right for trial in trials]
    distance = distances.mean(axis=0)

    best = tuple(settings[place] for place in tried)
    right_full = sum(survey.right for survey in surveys)
    countable = bool(right_full and right.any())
    shares = propagated[np.ix_(tried, candidates)]
    layer, setting = best_answering(candidates, best, right, right_full, shares) if countable else (-1, best[0])
    by_distance = earliest_close(candidates, distance[best.index(setting)], tolerance)
    layer = layer if countable else by_distance
    chosen = FastKV(tsp_layer=layer, **rates, **setting._asdict())
    return Calibration(
        model=name,
        samples=len(samples),
        digest=_digest(samples),
        lengths=tuple(len(sample.token_ids) for sample in samples),
        spans=tuple(sample.span for sample in samples),
        **rates,
        tolerance=tolerance,
        layers=candidates,
        settings=settings,
        finalists=best,
        propagated=propagated,
        kept_mean=kept_mean,
        kept_best=kept_best,
        overlap=np.mean([survey.overlap for survey in surveys], axis=0),
        distance=distance,
        right=right,
        right_full=right_full,
        answers=sum(bool(sample.answer) for sample in samples),
        tsp_layer=layer,
        setting=setting,
        by_distance=by_distance,
        decided_by="answers" if countable else "distance",
        flops_share=statistics.mean(_flops_share(c, chosen, sample) for sample in samples),
        seconds=_race(run, max(samples, key=lambda sample: len(sample.token_ids)), chosen) if timed else None,
    )


def _middle(num_layers: int) -> tuple[int, ...]:
    """From a quarter of the model to three quarters, as far as layers follow."""
    first = num_layers // 4
    return tuple(range(first, max(first, min(3 * num_layers // 4, num_layers - 2)) + 1))


def _check_numbers(tolerance: float, finalists: int, max_new_tokens: int) -> None:
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < np.inf:  # NaN fails too
        raise FastKVConfigError(f"tolerance must be >= 0, got {tolerance!r}")
    check_int("finalists", finalists, 1)
    check_int("max_new_tokens", max_new_tokens, 1)


def _check_candidates(
    settings: Sequence[Setting], candidates: Sequence[int], samples: Sequence[Sample], num_layers: int
) -> None:
    for name, values in (("samples", samples), ("window_sizes, kernel_sizes and poolings", settings),
                         ("layers", candidates)):  # fmt: skip
        if not values:
            raise FastKVConfigError(f"{name} must hold at least one each, got none")
    for layer in candidates:
        FastKV(tsp_layer=layer).check(num_layers)
    if len(settings) > 1 and not any(sample.span for sample in samples):
        found = "no sample has an answer" if not any(s.answer for s in samples) else "no answer stands in its prompt"
        raise InputError(f"{found}: {len(settings)} settings cannot be compared, give one window and one kernel")


def _check_prompts(run: _Run, samples: Sequence[Sample]) -> None:
    for number, sample in enumerate(samples, 1):
        try:
            run.prepared(sample, FullKV())
        except InputError as error:
            raise InputError(f"sample {number}: {error}") from error


def _most_promising(
    propagated: Float[np.ndarray, "M L"], kept_best: Float[np.ndarray, "M L"], layers: Sequence[int]
) -> list[int]:
    """Places of the settings, best first: the answer must pass TSP, and some head of the later layers must hold it.

    Promise: the product of the two shares, averaged over the candidate layers. Differences below a hundredth do not
    count; the settings come cheapest first, and the cheaper one goes before.
    """
    later = np.stack([kept_best[:, layer + 1 :].mean(axis=1) for layer in layers], axis=1)
    promise = (propagated[:, list(layers)] * later).mean(axis=1)
    return [int(place) for place in np.argsort(-np.round(promise, 2), kind="stable")]


def _mean(values: Sequence[Float[np.ndarray, "*S"]]) -> Float[np.ndarray, "*S"]:
    """Over the samples whose answer stands in the prompt; NaN if there are none."""
    measured = [value for value in values if not np.isnan(value).any()]
    return np.mean(measured, axis=0) if measured else np.full_like(values[0], np.nan)


def _digest(samples: Sequence[Sample]) -> str:
    plain = [[list(map(int, s.token_ids)), int(s.window_end), list(map(int, s.answer))] for s in samples]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Passes
# ---------------------------------------------------------------------------------------------------------------------


class _Survey(NamedTuple):
    """One sample with the full context, seen through every setting."""

    hidden: Float[np.ndarray, " E"]
    right: bool
    propagated: Float[np.ndarray, "M L"]  # shares of the answer's tokens, NaN without an answer in the prompt
    mean: Float[np.ndarray, "M L"]
    best: Float[np.ndarray, "M L"]
    overlap: Float[np.ndarray, "M L L"]


def _survey(run: _Run, sample: Sample, methods: tuple[FastKV, ...]) -> _Survey:
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
        rows, entries = _look(
            model, on.at, np.int32(i), tokens, kept, answer, methods=methods, kernels=on.static.kernels
        )
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
    hidden = np.asarray(_last_hidden(model, on.at.x))
    return _Survey(hidden, _is_right(run, result, sample), propagated, mean, best, _agreement(passed, fixed))


@partial(jax.jit, static_argnames=("methods", "kernels"))
def _look(
    model: Llama, at: Progress, index, tokens, kept, answer, *, methods: tuple[FastKV, ...], kernels: Kernels
) -> tuple[Bool[Array, "M S"], Bool[Array, "M K A"]]:
    """What each method (budgets tokens, kept [M]) would choose of the rows that enter a layer, as it would itself:
    rows that go on, and which of the columns `answer` [A] each KV head keeps."""
    ops = Ops(kernels, model.mesh)
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


def _distance(hidden: Float[np.ndarray, " E"], full: Float[np.ndarray, " E"]) -> float:
    """Eq. 3, normalised as in figure 3."""
    return float(np.square(hidden - full).sum() / np.square(full).sum())


class _Trial(NamedTuple):
    """One sample with TSP after one layer."""

    hidden: Float[np.ndarray, " E"]
    right: bool


def _trials(run: _Run, sample: Sample, method: FastKV, layers: Sequence[int]) -> Iterable[_Trial]:
    """The method with each of the (rising) layers as TSP layer: the layers before it are run once for all."""
    on, (before, *rest) = run.begun(sample, method)
    after = rest[0] if rest else before._replace(kept=before.kept[-1:])  # a budget of all makes one stage
    on.enter(before._replace(kept=before.kept[:1]))
    for i in range(layers[-1] + 1):
        on.layers([i])
        if i in layers:
            trial = on.branch()
            trial.enter(after)
            for j in range(i + 1, run.model.config.num_layers):
                trial.layers([j])
            trial.join()
            hidden = np.asarray(_last_hidden(run.model, trial.at.x))
            yield _Trial(hidden, _is_right(run, trial.finish(), sample))


@jax.jit
def _last_hidden(model: Llama, x: Float[Array, "1 S E"]) -> Float[Array, " E"]:
    """What the language-model head reads: the last row after the final norm."""
    return rms_norm(x[0, -1], model.norm[...], model.config.rms_norm_eps).astype(jnp.float32)


def _is_right(run: _Run, result: Prefill, sample: Sample) -> bool:
    """Whether the answer is among the tokens decoded greedily. The cache is donated."""
    made: list[int] = []
    for chunk, _ in decode_chunks(run.model, result, max_new_tokens=run.max_new_tokens if sample.answer else 0):
        made += chunk[0].tolist()
        if _says(made, sample.answer, run.tokenizer):
            return True
    return False


def _says(made: Sequence[int], answer: Sequence[int], tokenizer: Any) -> bool:
    if tokenizer is None:
        return longest_run(made, answer)[1] == len(answer)
    return tokenizer.decode(answer).strip() in tokenizer.decode(made)


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def _flops_share(config: LlamaConfig, method: FastKV, sample: Sample) -> float:
    chosen, full = (
        sum(
            (run.last - run.first + 1) * layer_flops(config, run.tokens)
            for run in effective_budgets(m, len(sample.token_ids), sample.window_end, config.num_layers)
        )
        for m in (method, FullKV())
    )
    return chosen / full


def _race(run: _Run, sample: Sample, method: FastKV) -> tuple[float, float]:
    """Median seconds of prefill, full and with the method, in turns; the first turn compiles and does not count."""
    seconds: dict[Method, list[float]] = {FullKV(): [], method: []}
    for turn in range(REPEATS + 1):
        for contestant, times in seconds.items():
            began = time.perf_counter()
            jax.block_until_ready(run.prepared(sample, contestant).run())
            times += [time.perf_counter() - began] if turn else []
    full, chosen = (statistics.median(times) for times in seconds.values())
    return full, chosen
