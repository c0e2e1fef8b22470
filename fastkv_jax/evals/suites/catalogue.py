"""A suite by its name and settings: its samples, how an answer is scored, how scores are averaged."""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals.protocols import PROTOCOLS
from fastkv_jax.evals.reports.averages import Average, Rows, by_group, by_length, of_groups, of_tasks
from fastkv_jax.evals.sample import Sample
from fastkv_jax.evals.suites import longbench, needle_grid, ruler, ruler_generator, scorers
from fastkv_jax.evals.texts.haystack import words
from fastkv_jax.seeds import check_seed

Count = Callable[[str], int]  # a text's tokens


@dataclass(frozen=True)
class SuiteSettings:
    """What a suite is made of; a suite ignores nothing: `check` refuses what it has no use for."""

    suite: str  # "ruler", "longbench", "needle" or "perplexity"
    tasks: tuple[str, ...] = ()  # ruler: () = the paper's 11, or all 13 with data; longbench: () = all 16
    lengths: tuple[int, ...] = ()  # tokens of prompt and answer together
    samples: int | None = None  # of each task and length; None: all that the data has, 10 where they are made
    depths: int | None = None  # needle: how many places in the text
    data: str | None = None  # a folder with the published data
    texts: str | None = None  # a folder of .txt files to hide needles in, or to read
    protocol: str | None = None  # longbench: "upstream" or "fastkv"
    seed: int = 42


@dataclass(frozen=True)
class Suite:
    """Samples ready to be asked."""

    samples: tuple[Sample, ...]
    metrics: Mapping[str, str]  # of each task
    first_line: frozenset[str] = frozenset()  # tasks whose answer is its first line
    averages: Callable[[Rows], dict[str, Average]] = lambda rows: {}  # of its own records that have scores

    def score(self, sample: Sample, answer: Mapping[str, Any]) -> scorers.Scored | None:
        """What the task's metric says; None for a text whose likelihood was measured."""
        metric = self.metrics[sample.task]
        if metric == "likelihood":
            return None
        one_line = sample.task in self.first_line
        said = answer["prediction"]
        return scorers.score(metric, said, sample.answers, classes=sample.classes, first_line=one_line)


USES = {
    "ruler": {"tasks", "lengths", "samples", "data", "texts"},
    "longbench": {"tasks", "samples", "data", "protocol"},
    "needle": {"lengths", "depths", "texts"},
    "perplexity": {"lengths", "samples", "texts"},
}


def check(settings: SuiteSettings) -> None:
    """Raise `FastKVConfigError` for what cannot work, before a tokenizer is there."""
    s = settings
    for name, kind in get_type_hints(SuiteSettings).items():  # a grid's file may hold anything
        value, items = getattr(s, name), get_args(kind)[0] if get_origin(kind) is tuple else None
        if not isinstance(value, tuple if items else kind) or (items and not all(isinstance(v, items) for v in value)):
            what = f"a list of {items.__name__}" if items else getattr(kind, "__name__", kind)
            raise FastKVConfigError(f"{name} must be {what}, got {value!r}")
    if s.suite not in USES:
        raise FastKVConfigError(f"suite must be one of {', '.join(USES)}, got {s.suite!r}")
    given = {"tasks": s.tasks, "lengths": s.lengths, "samples": s.samples, "depths": s.depths, "data": s.data,
             "texts": s.texts, "protocol": s.protocol}  # fmt: skip
    useless = [name for name, value in given.items() if value not in (None, ()) and name not in USES[s.suite]]
    if useless:
        raise FastKVConfigError(f"suite {s.suite} has no use for {useless[0]}={given[useless[0]]!r}")
    for name, value in (("samples", s.samples), ("depths", s.depths), ("lengths", min(s.lengths, default=None))):
        if value is not None and value < 1:
            raise FastKVConfigError(f"{name} must be >= 1, got {value}")
    check_seed(s.seed)
    if s.protocol is not None and s.protocol not in PROTOCOLS:
        raise FastKVConfigError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {s.protocol!r}")
    if s.suite == "longbench" and s.data is None:
        raise FastKVConfigError("suite longbench needs data: a folder with its <task>.jsonl files")
    if s.suite != "longbench" and not s.lengths:
        raise FastKVConfigError(f"suite {s.suite} needs lengths, in tokens")
    for task in s.tasks:
        known = ruler.TASKS if s.suite == "ruler" else longbench.TASKS
        if task not in known:
            raise FastKVConfigError(f"suite {s.suite} has no task {task!r}; there are: {', '.join(known)}")


def build(settings: SuiteSettings, count: Count, template_tokens: int) -> Suite:
    """The suite's samples; `template_tokens` are those of the chat template. Raises `InputError` for data."""
    check(settings)
    return {"ruler": _ruler, "longbench": _longbench, "needle": _needle, "perplexity": _perplexity}[settings.suite](
        settings, count, template_tokens
    )


def _ruler(s: SuiteSettings, count: Count, template_tokens: int) -> Suite:
    tasks = s.tasks or (tuple(ruler.TASKS) if s.data else ruler.PAPER)
    samples: list[Sample] = []
    for length in s.lengths:
        for task in tasks:
            if s.data is not None:
                folder = os.path.join(s.data, str(length))
                samples += ruler.read(ruler.find(folder, task), task, str(length))[: s.samples]
                continue
            rows = ruler_generator.rows(
                task, length, s.samples or 10, count, seed=s.seed, essays=s.texts, template_tokens=template_tokens
            )
            samples += ruler.from_rows(rows, task, str(length))
    metrics = {task: ruler.task(task).metric for task in tasks}
    return Suite(_named(samples), metrics, averages=lambda rows: by_length(rows, "RULER"))


def _longbench(s: SuiteSettings, count: Count, template_tokens: int) -> Suite:
    assert s.data is not None
    tasks = s.tasks or tuple(longbench.TASKS)
    protocol = PROTOCOLS[s.protocol or "upstream"]
    samples = [sample for task in tasks for sample in longbench.read(s.data, task, protocol)[: s.samples]]
    first = frozenset(task for task in tasks if longbench.TASKS[task].first_line)
    return Suite(tuple(samples), {task: longbench.TASKS[task].metric for task in tasks}, first, _longbench_averages)


def _longbench_averages(rows: Rows) -> dict[str, Average]:
    """Of groups of tasks and, as FastKV's paper has it, of these; of the tasks there are, if not all are there."""
    there = {row["task"] for row in rows}
    if there < set(longbench.TASKS):
        return {"LongBench, some tasks": of_tasks(rows)}
    groups = longbench.GROUPS
    return {**by_group(rows, groups), "LongBench": of_groups(rows, groups), "LongBench, by task": of_tasks(rows)}


def _needle(s: SuiteSettings, count: Count, template_tokens: int) -> Suite:
    depths = needle_grid.depths(s.depths or 10)
    samples = needle_grid.samples(
        s.lengths, depths, count, seed=s.seed, folder=s.texts, template_tokens=template_tokens
    )
    metrics = {"needle": needle_grid.Needle().metric}
    return Suite(tuple(samples), metrics, averages=lambda rows: by_length(rows, "needle"))


def _perplexity(s: SuiteSettings, count: Count, template_tokens: int) -> Suite:
    """The last quarter of a text, after the rest was read."""
    samples = []
    for length in s.lengths:
        for i in range(s.samples or 10):
            rng = random.Random(s.seed * 1_000_003 + i)
            drawn = words(length, rng.randrange(1 << 30), s.texts)
            size = length * len(drawn) // max(count(" ".join(drawn)), 1)
            kept = drawn[: min(size, len(drawn))]
            while count(" ".join(kept)) > length:
                kept = kept[: len(kept) - max(len(kept) // 100, 1)]
            cut = 3 * len(kept) // 4
            text, rest = " ".join(kept[:cut]), " " + " ".join(kept[cut:])
            samples.append(Sample("perplexity", f"{length}-{i}", text, "", (rest,), 0, chat=False, group=str(length)))
    return Suite(tuple(samples), {"perplexity": "likelihood"})


def _named(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Ids that tell lengths apart."""
    return tuple(replace(sample, id=f"{sample.group}-{sample.id}") for sample in samples)
