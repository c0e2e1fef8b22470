"""Every sample answered once: batches of one length, longest first, each record written when it is there.

What was answered before is not answered again: batches are planned from all samples, so that a resumed run has the same
batches, and so the same records, as one that was never disturbed. The number of processes is part of that plan.
"""

import gc
import hashlib
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkv_jax.buckets import bucket_for
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.evals.records.folder import Output
from fastkv_jax.evals.records.records import Key, Record
from fastkv_jax.evals.running.progress import progress
from fastkv_jax.evals.sample import Company, Encoded, Engine, Sample
from fastkv_jax.evals.suites.scorers import Scored

Score = Callable[[Sample, Mapping[str, Any]], Scored | None]  # of what the engine answered; None: nothing to score

OUT_OF_MEMORY = "out of memory"
MOST_PROBLEMS = 3  # told in one line


@dataclass(frozen=True)
class Job:
    """An encoded sample."""

    sample: Sample
    tokens: "array[int]"  # int32: as lists, long prompts by the thousand would take nine times the memory
    window_end: int
    whole: int

    @property
    def key(self) -> Key:
        """What the record is found by."""
        return self.sample.task, self.sample.id

    @property
    def shape(self) -> tuple[int, bool]:
        """(columns, whether tokens are made): what rows of one batch have in common."""
        return bucket_for(len(self.tokens)), self.sample.max_new_tokens > 0

    def encoded(self) -> Encoded:
        """For the engine."""
        return Encoded(self.sample, self.tokens.tolist(), self.window_end, self.whole)

    def prompt_sha256(self) -> str:
        """Of the token ids, as little-endian int32."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


@dataclass(frozen=True)
class Summary:
    """How a process's run ended."""

    samples: int  # of this process
    answered: int  # just now
    found: int  # answered before
    failed: int  # of this process, without a score for an error
    missing: int  # of all processes; results.jsonl is there if none are


def run(samples: Sequence[Sample], engine: Engine, output: Output, **options: Any) -> Summary:
    """One method's evaluation: `run_together` of one; options as there."""
    return run_together(samples, Alone(engine), [output], **options)[0]


@dataclass(frozen=True)
class Alone:
    """An engine as a company of one."""

    engine: Engine

    def encode(self, sample: Sample) -> Encoded:
        """The engine's."""
        return self.engine.encode(sample)

    def answer_all(self, batch: Sequence[Encoded]) -> list[list[dict[str, Any]]]:
        """The engine's, alone."""
        return [self.engine.answer(batch)]


def run_together(
    samples: Sequence[Sample],
    company: Company,
    outputs: Sequence[Output],
    *,
    score: Score,
    batch_tokens: int,
    max_rows: int,
    save_prompts: bool = False,
    stop: Callable[[], None] = lambda: None,
    report: Callable[[str], object] | None = None,
) -> list[Summary]:
    """Answer this process's samples that have no record yet, and write results.jsonl if all processes' are there.

    One output for each of the company's methods, all of the same process.

    A batch has at most `max_rows` rows and, padded, `batch_tokens` tokens of prompt, but at least one row. A batch the
    device has no memory for is halved; a single row becomes a record with "error". `stop` is called between batches
    and raises what is to end the run; see `deferred_signals`. `report` takes lines for people.

    A record has task, id, group, config_hash, protocol (if the config names one), prompt_sha256, prompt_tokens (as
    answered) and whole_tokens (before truncation), all that the engine returned, score, and problem, if the scorer had
    one; with `save_prompts` the prompt's text, before the template and truncation.

    Raises `InputError` before anything is answered if samples cannot be encoded or are not those of the folder, and
    `ValueError` for a score or a field that is NaN or infinite.
    """
    for name, value in (("batch_tokens", batch_tokens), ("max_rows", max_rows)):
        if value < 1:
            raise FastKVConfigError(f"{name} must be >= 1, got {value}")
    keys = [(sample.task, sample.id) for sample in samples]
    for output in outputs:
        output.expect(keys)
    first, say = outputs[0], report or (lambda _: None)
    jobs = encode_all(samples[first.process :: first.processes], company, stop)
    found = [sum(job.key in output.done for job in jobs) for output in outputs]
    for output, before in zip(outputs, found, strict=True):
        _check_prompts(jobs, output)
        for note in output.notes:
            say(note)
        if before:
            say(f"{before} of {len(jobs)} samples were answered before")

    planned = plan(jobs, batch_tokens, max_rows)
    waiting = [batch for batch in planned if any(job.key not in output.done for job in batch for output in outputs)]
    too_large: set[tuple[int, ...]] = set()
    with progress(sum(map(_tokens, waiting)), report) as advance:
        for batch in waiting:
            stop()
            for job, answers in _answers(company, batch, len(outputs), too_large):
                for output, answer in zip(outputs, answers, strict=True):
                    if job.key not in output.done:
                        output.add(record_of(job, answer, score, output, save_prompts))
            advance(_tokens(batch))
    return [_summary(jobs, keys, output, before) for output, before in zip(outputs, found, strict=True)]


def _summary(jobs: Sequence[Job], keys: Sequence[Key], output: Output, found: int) -> Summary:
    failed = sum("error" in output.done[job.key] for job in jobs)
    return Summary(len(jobs), len(jobs) - found, found, failed, output.finish(keys))


def encode_all(
    samples: Sequence[Sample], engine: Engine | Company, stop: Callable[[], None] = lambda: None
) -> list[Job]:
    """Every sample's prompt; raises `InputError` naming those that cannot be encoded."""
    jobs: list[Job] = []
    problems: list[str] = []
    for sample in samples:
        stop()
        try:
            _, tokens, window_end, whole = engine.encode(sample)
            jobs.append(Job(sample, array("i", tokens), window_end, whole))
        except InputError as error:
            problems.append(f"{sample.task} {sample.id}: {error}")
    if problems:
        more = "; ..." if len(problems) > MOST_PROBLEMS else ""
        raise InputError(
            f"{len(problems)} of {len(samples)} samples cannot be asked: {'; '.join(problems[:MOST_PROBLEMS])}{more}"
        )
    return jobs


def plan(jobs: Sequence[Job], batch_tokens: int, max_rows: int) -> list[list[Job]]:
    """Batches of one shape each, the longest prompts first: what does not fit shows at once.

    Within a shape the longest answers come first, so that few batches wait for one row's.
    """
    shapes: dict[tuple[int, bool], list[Job]] = defaultdict(list)
    for job in sorted(jobs, key=lambda job: (-job.sample.max_new_tokens, -len(job.tokens))):
        shapes[job.shape].append(job)
    batches = []
    for (columns, _), mine in sorted(shapes.items(), reverse=True):
        rows = max(1, min(max_rows, batch_tokens // columns))
        batches += [mine[at : at + rows] for at in range(0, len(mine), rows)]
    return batches


def record_of(job: Job, answer: Mapping[str, Any], score: Score, output: Output, save_prompts: bool) -> Record:
    """What is written down of an answer; raises `ValueError` for a score that is no finite number."""
    sample = job.sample
    own: Record = {"task": sample.task, "id": sample.id, "group": sample.group, "config_hash": output.config_hash}
    if "protocol" in output.config:
        own["protocol"] = output.config["protocol"]
    own |= {"prompt_sha256": job.prompt_sha256(), "prompt_tokens": len(job.tokens), "whole_tokens": job.whole}
    if save_prompts:
        own["prompt"] = sample.context + sample.question + sample.prefill
    if taken := (own.keys() | {"score", "problem"}) & answer.keys():
        raise ValueError(f"the engine's answer to {sample.task} {sample.id} has fields of the runner: {sorted(taken)}")
    if "error" in answer:
        return {**own, **answer}
    scored = score(sample, answer)
    if scored is None:
        return {**own, **answer, "score": None}
    if not math.isfinite(scored.score):
        raise ValueError(f"the score of {sample.task} {sample.id} is {scored.score}")
    problem = {"problem": scored.problem} if scored.problem else {}
    return {**own, **answer, "score": float(scored.score), **problem}


def _answers(
    company: Company, batch: list[Job], outputs: int, too_large: set[tuple[int, ...]]
) -> Iterator[tuple[Job, list[dict[str, Any]]]]:
    """Each job's answer for every output, from as few batches as the device has memory for."""
    size = (len(batch), *batch[0].shape)
    answers = None if len(batch) > 1 and size in too_large else _answers_or_none(company, batch)
    if answers is not None:
        for i, job in enumerate(batch):
            yield job, [mine[i] for mine in answers]
    elif len(batch) == 1:
        yield batch[0], [{"error": OUT_OF_MEMORY}] * outputs
    else:
        too_large.add(size)
        half = (len(batch) + 1) // 2
        yield from _answers(company, batch[:half], outputs, too_large)
        yield from _answers(company, batch[half:], outputs, too_large)


def _answers_or_none(company: Company, batch: list[Job]) -> list[list[dict[str, Any]]] | None:
    """None: out of memory."""
    try:
        answers = company.answer_all([job.encoded() for job in batch])
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
    else:
        if any(len(mine) != len(batch) for mine in answers):
            raise ValueError(f"{[len(mine) for mine in answers]} answers to {len(batch)} questions")
        return answers
    gc.collect()  # the error's traceback held the arrays of the batch that failed
    return None


def _check_prompts(jobs: Sequence[Job], output: Output) -> None:
    for job in jobs:
        before = output.done.get(job.key)
        if before is not None and before.get("prompt_sha256") != job.prompt_sha256():
            raise InputError(
                f"{output.path}: {' '.join(job.key)} was answered with another prompt than it has now (other data or "
                "tokenizer); choose another folder"
            )


def _tokens(batch: Sequence[Job]) -> int:
    return sum(len(job.tokens) for job in batch)
