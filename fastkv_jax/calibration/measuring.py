"""Choosing FastKV's TSP layer, window and kernel for a model by measuring on the user's own questions.

    survey   one full pass per sample: where every setting would let the answer's tokens through, after every layer
    trials   for the settings that promise most, one pass per sample that branches off after each candidate layer

Layers are run one at a time through the programs of a prefill, so that no layer and no candidate compiles anything new.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple, TypeVar, Unpack

import jax
import numpy as np
from jaxtyping import Float, Int

from fastkv_jax.buckets import round_up
from fastkv_jax.calibration.result import Calibration
from fastkv_jax.calibration.rules import Setting, best_answering, earliest_close, most_promising
from fastkv_jax.calibration.runs import Run
from fastkv_jax.calibration.samples import Sample, digest
from fastkv_jax.calibration.search import CalibrationOptions, Search
from fastkv_jax.calibration.survey import Survey, survey
from fastkv_jax.calibration.trials import distance, trials
from fastkv_jax.costs import layer_flops
from fastkv_jax.errors import InputError
from fastkv_jax.methods import FastKV, FullKV
from fastkv_jax.methods.base import Method
from fastkv_jax.methods.plan import effective_budgets
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.llama import Llama

ANSWER_TILE = 8  # answers up to so many tokens longer share a compilation
REPEATS = 3  # timed prefills of each kind

T = TypeVar("T")


def calibrate(model: Llama, samples: Iterable[Sample], **options: Unpack[CalibrationOptions]) -> Calibration:
    """Measure and choose: the earliest TSP layer, then the smallest kernel and window, that answers like full context,
    or the most; see `best_answering`.

    Where the samples have no answers there is nothing to count: give one setting, and eq. 3 chooses the layer. It does
    so too where no answer came out, with the full context or without it: better questions would help more.

    Args:
        model: from `load_model`
        samples: questions with their answers, as `make_samples` makes them
        **options: those of `CalibrationOptions`; each has a default

    Raises:
        FastKVConfigError: for settings that cannot be searched; like the next, before anything runs
        InputError: for samples that cannot be read or compared

    Examples:
        >>> import fastkv_jax as fk
        >>> from fastkv_jax.calibration.samples import make_samples
        >>> model, tokenizer = fk.load_model("smollm2-135m", dtype="float32"), fk.load_tokenizer("smollm2-135m")
        >>> row = {"prompt": "The code is 4711. " + "Boats go out. " * 20 + "What is the code?", "answer": "4711"}
        >>> samples = make_samples(tokenizer, [row])
        >>> found = fk.calibrate(model, samples, layers=[10, 14], window_sizes=[8], kernel_sizes=[7], max_new_tokens=8)
        >>> found.layers, found.right.shape
        ((10, 14), (1, 2))
        >>> method = found.method()
    """
    samples, search, c = tuple(samples), Search(**options), model.config
    settings, candidates = search.settings(), search.candidates(c.num_layers)
    methods = tuple(search.method(setting, 0) for setting in settings)
    search.check(settings, candidates, samples, c.num_layers)
    slots = round_up(max(len(sample.answer) for sample in samples) or 1, ANSWER_TILE)
    run = Run(model, search.platform or model.platform, search.max_new_tokens, search.tokenizer, slots)
    _check_prompts(run, samples)

    finalists = min(search.finalists, len(settings))
    counted = _counter(search.progress, len(samples) * (1 + finalists * len(candidates)))
    surveys = list(counted(survey(run, sample, methods) for sample in samples))
    shares = _Shares(*(_mean([getattr(one, name) for one in surveys]) for name in _Shares._fields))
    places = most_promising(shares.propagated, shares.best, candidates)[:finalists]
    distances = np.zeros((len(samples), finalists, len(candidates)))
    right = np.zeros((finalists, len(candidates)), np.int64)
    for (i, sample), (f, place) in product(enumerate(samples), enumerate(places)):
        tried = list(counted(trials(run, sample, methods[place], candidates)))
        distances[i, f] = [distance(trial.hidden, surveys[i].hidden) for trial in tried]
        right[f] += [trial.right for trial in tried]
    measured = _Measured(settings, candidates, places, surveys, shares, distances.mean(axis=0), right)
    return _chosen(run, search, samples, measured)


class _Shares(NamedTuple):
    """Of the answers' tokens, mean over the samples; as in `Survey`."""

    propagated: Float[np.ndarray, "M L"]
    mean: Float[np.ndarray, "M L"]
    best: Float[np.ndarray, "M L"]


class _Measured(NamedTuple):
    """Everything that the rules look at."""

    settings: tuple[Setting, ...]
    candidates: tuple[int, ...]
    places: list[int]  # of the finalists among the settings
    surveys: list[Survey]
    shares: _Shares
    distance: Float[np.ndarray, "F C"]
    right: Int[np.ndarray, "F C"]


def _counter(progress: Callable[[int, int], object], total: int) -> Callable[[Iterable[T]], Iterator[T]]:
    """What passes results on, and tells how many there have been of how many."""
    done = 0

    def counted(results: Iterable[T]) -> Iterator[T]:
        nonlocal done
        for result in results:
            done += 1
            progress(done, total)
            yield result

    return counted


def _chosen(run: Run, search: Search, samples: Sequence[Sample], measured: _Measured) -> Calibration:
    """The rules' choice, with all that led to it."""
    settings, layers, c = measured.settings, measured.candidates, run.model.config
    best = tuple(settings[place] for place in measured.places)
    right, right_full = measured.right, sum(one.right for one in measured.surveys)
    countable = bool(right_full and right.any())
    passed = measured.shares.propagated[np.ix_(measured.places, layers)]
    layer, setting = best_answering(layers, best, right, right_full, passed) if countable else (-1, best[0])
    by_distance = earliest_close(layers, measured.distance[best.index(setting)], search.tolerance)
    layer = layer if countable else by_distance
    chosen = search.method(setting, layer)
    longest = max(samples, key=lambda sample: len(sample.token_ids))
    return Calibration(
        model=search.name,
        samples=len(samples),
        digest=digest(samples),
        lengths=tuple(len(sample.token_ids) for sample in samples),
        spans=tuple(sample.span for sample in samples),
        tsp_rate=search.tsp_rate,
        retention_rate=search.retention_rate,
        tolerance=search.tolerance,
        layers=layers,
        settings=settings,
        finalists=best,
        propagated=measured.shares.propagated,
        kept_mean=measured.shares.mean,
        kept_best=measured.shares.best,
        overlap=np.mean([one.overlap for one in measured.surveys], axis=0),
        distance=measured.distance,
        right=right,
        right_full=right_full,
        answers=sum(bool(sample.answer) for sample in samples),
        tsp_layer=layer,
        setting=setting,
        by_distance=by_distance,
        decided_by="answers" if countable else "distance",
        flops_share=statistics.mean(_flops_share(c, chosen, sample) for sample in samples),
        seconds=_race(run, longest, chosen) if search.timed else None,
    )


def _check_prompts(run: Run, samples: Sequence[Sample]) -> None:
    for number, sample in enumerate(samples, 1):
        try:
            run.prepared(sample, FullKV())
        except InputError as error:
            raise InputError(f"sample {number}: {error}") from error


def _mean(values: Sequence[Float[np.ndarray, "*S"]]) -> Float[np.ndarray, "*S"]:
    """Over the samples whose answer stands in the prompt; NaN if there are none."""
    measured = [value for value in values if not np.isnan(value).any()]
    return np.mean(measured, axis=0) if measured else np.full_like(values[0], np.nan)


def _flops_share(config: LlamaConfig, method: FastKV, sample: Sample) -> float:
    chosen, full = (
        sum(
            (run.last - run.first + 1) * layer_flops(config, run.tokens)
            for run in effective_budgets(m, len(sample.token_ids), sample.window_end, config.num_layers)
        )
        for m in (method, FullKV())
    )
    return chosen / full


def _race(run: Run, sample: Sample, method: FastKV) -> tuple[float, float]:
    """Median seconds of prefill, full and with the method, in turns; the first turn compiles and does not count."""
    seconds: dict[Method, list[float]] = {FullKV(): [], method: []}
    for turn in range(REPEATS + 1):
        for contestant, times in seconds.items():
            began = time.perf_counter()
            jax.block_until_ready(run.prepared(sample, contestant).run())
            times += [time.perf_counter() - began] if turn else []
    full, chosen = (statistics.median(times) for times in seconds.values())
    return full, chosen
