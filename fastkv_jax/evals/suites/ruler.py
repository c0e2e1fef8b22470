"""RULER's 13 synthetic tasks, from JSON lines of NVIDIA's form, as NVIDIA's generator, FastKV and ours write them."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from fastkv_jax.errors import InputError
from fastkv_jax.evals.sample import Sample
from fastkv_jax.evals.suites import grids
from fastkv_jax.evals.suites.scorers import Scored, score
from fastkv_jax.evals.texts import rows

_FIELDS = {"index": "a whole number", "input": "text", "outputs": "a list of texts, not empty"}


@dataclass(frozen=True)
class Needles:
    """What a needle task hides, and in what."""

    haystack: str  # "noise", "essay" or "needle": more needles
    key: str  # "words" or "uuids"
    value: str  # "numbers" or "uuids"
    keys: int
    values: int  # of each key
    queries: int  # keys that are asked for


@dataclass(frozen=True)
class Task:
    """One task: its prompt, and how answers are scored."""

    name: str
    kind: str  # "niah", "vt", "cwe", "fwe" or "qa"
    template: str  # with {context}
    answer_prefix: str  # the beginning of the answer, given
    max_new_tokens: int
    metric: str
    needles: Needles | None = None

    def parts(self, **values: Any) -> tuple[str, str, str]:
        """Template before the context, template behind it, and answer prefix, filled in."""
        before, after = self.template.split("{context}")
        return before.format(**values), after.format(**values), self.answer_prefix.format(**values)

    @property
    def question_start(self) -> str:
        """How what is asked begins, without space around it."""
        return self.template.split("{context}")[1].split("{")[0].strip()

    def score(self, sample: Sample, prediction: str) -> Scored:
        """The sample's score, 0 to 1."""
        return score(self.metric, prediction, sample.answers)


def _tasks() -> dict[str, Task]:
    suite, tasks = grids.load("ruler"), {}
    for name, settings in suite["tasks"].items():
        kind = dict(suite["kinds"][settings["kind"]])
        needles = Needles(**settings["needles"]) if "needles" in settings else None
        if needles is not None and needles.values * needles.queries == 1:  # NVIDIA's singular
            for part in ("template", "answer_prefix"):
                kind[part] = kind[part].replace("Some", "A").replace("are all", "is").replace("are", "is")
        tasks[name] = Task(name, settings["kind"], needles=needles, **kind)
    return tasks


TASKS: Mapping[str, Task] = _tasks()
PAPER = tuple(name for name, task in TASKS.items() if task.kind != "qa")  # FastKV's 11


def task(name: str) -> Task:
    """The task called so; `InputError` with the names there are."""
    if name not in TASKS:
        raise InputError(f"RULER task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def find(folder: str | os.PathLike[str], name: str) -> epath.Path:
    """A task's file: <folder>/<task>.jsonl as FastKV has it, or <folder>/<task>/validation.jsonl as NVIDIA has it."""
    there = [epath.Path(folder) / f"{task(name).name}.jsonl", epath.Path(folder) / name / "validation.jsonl"]
    try:
        return next((path for path in there if path.exists()), there[0])
    except ImportError:  # for gs://; reading the file says so
        return there[0]


def read(path: str | os.PathLike[str], name: str, group: str = "") -> list[Sample]:
    """The samples of a file. `group` is what scores are averaged by, as a rule the length in tokens.

    The prompts must be without a chat template, which the model's own is put around: NVIDIA's `base`. Raises
    `InputError` with file, line and field.
    """
    return [
        _sample(f"{path}, line {line}", i, row, task(name), group)
        for i, (line, row) in enumerate(rows.read(path, _FIELDS))
    ]


def from_rows(rows: Iterable[Mapping[str, Any]], name: str, group: str = "") -> list[Sample]:
    """The samples of rows that are not in a file."""
    return [_sample(f"row {i}", i, row, task(name), group) for i, row in enumerate(rows)]


def _sample(where: str, i: int, row: Mapping[str, Any], task: Task, group: str) -> Sample:
    prompt, prefix = row["input"], row.get("answer_prefix")
    if prefix is None:  # FastKV's files end with it; NVIDIA looks for its first 10 characters
        at = prompt.rfind(task.answer_prefix[:10])
        if at < 0:
            raise InputError(f"{where}: field 'input' must end with {task.answer_prefix[:10]!r}... of {task.name}")
        prompt, prefix = prompt[:at], prompt[at:]
    elif not isinstance(prefix, str):
        raise InputError(f"{where}: field 'answer_prefix' must be text, got {prefix!r}")
    if re.search(r"<\|\w+\|>|\[/?INST\]|<SPECIAL_\d+>", prompt[:200] + prompt[-200:]):
        raise InputError(f"{where}: field 'input' holds a chat template; generate with --model_template_type base")
    at = prompt.rfind(task.question_start)
    if at < 0:
        raise InputError(f"{where}: field 'input' must hold {task.question_start!r}, as {task.name} asks")
    at = len(prompt[:at].rstrip())  # the space between belongs to the question
    return Sample(
        task=task.name,
        id=str(i),  # not `index`: in NVIDIA's needle files that is the answer's place in the text
        context=prompt[:at],
        question=prompt[at:],
        answers=tuple(row["outputs"]),
        max_new_tokens=task.max_new_tokens,
        prefill=prefix,
        group=group,
    )
