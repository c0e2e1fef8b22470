"""LongBench's 16 English and code tasks, from its JSON lines; nothing is downloaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from etils import epath

from fastkv_jax.errors import InputError
from fastkv_jax.evals.protocols import UPSTREAM, Protocol
from fastkv_jax.evals.sample import Sample
from fastkv_jax.evals.suites import grids
from fastkv_jax.evals.suites.scorers import Scored, score
from fastkv_jax.evals.texts import rows

_FIELDS = {
    "input": "text",
    "context": "text",
    "answers": "a list of texts, not empty",
    "length": "a whole number",
    "dataset": "text",
    "language": "text",
    "all_classes": "null or a list of texts",
    "_id": "text or a whole number",
}


@dataclass(frozen=True)
class Task:
    """One task: its prompt, and how answers are scored."""

    name: str
    template: str  # with {context} and, in most, {input}
    max_new_tokens: int
    metric: str
    chat: bool  # False: the prompt is a text to go on with, also for chat models
    first_line: bool  # only the first line of an answer counts

    def prompt(self, context: str, question: str) -> tuple[str, str]:
        """The filled-in template, cut behind the context."""
        before, after = self.template.split("{context}")
        return before + context, after.replace("{input}", question)

    def score(self, sample: Sample, prediction: str) -> Scored:
        """The sample's score, 0 to 1."""
        return score(self.metric, prediction, sample.answers, classes=sample.classes, first_line=self.first_line)


_SUITE = grids.load("longbench")
TASKS: Mapping[str, Task] = {name: Task(name, **settings) for name, settings in _SUITE["tasks"].items()}
GROUPS: Mapping[str, tuple[str, ...]] = {name: tuple(tasks) for name, tasks in _SUITE["groups"].items()}


def read(folder: str | os.PathLike[str], task: str, protocol: Protocol = UPSTREAM) -> list[Sample]:
    """The samples of <folder>/<task>.jsonl, in the file's order; the folder may be on gs:// if gcsfs is installed.

    Raises `InputError` with file, line and field.
    """
    if task not in TASKS:
        raise InputError(f"LongBench task must be one of {', '.join(TASKS)}, got {task!r}")
    known = TASKS[task]
    path = epath.Path(folder) / f"{task}.jsonl"
    samples, seen = [], set()
    for line, row in rows.read(path, _FIELDS):
        id = str(row["_id"])
        id = f"{id}#{line}" if id in seen else id  # a sample that stands there twice counts twice
        seen.add(id)
        if known.metric == "classification" and not row["all_classes"]:
            raise InputError(f"{path}, line {line}: field 'all_classes' must name the classes of {task}")
        context, question = known.prompt(row["context"], row["input"])
        samples.append(
            Sample(
                task=task,
                id=id,
                context=context,
                question=question,
                answers=tuple(row["answers"]),
                max_new_tokens=known.max_new_tokens,
                chat=known.chat,
                stop=protocol.stop(task),
                classes=tuple(row["all_classes"] or ()),
            )
        )
    return samples
