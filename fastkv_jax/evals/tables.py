"""Several runs beside each other, a row each: what they scored and what it cost. For terminals, Markdown, CSV, JSON."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

Interval = Callable[[Sequence[float]], tuple[float, float]]  # of the scores of a task: where their mean may lie
Averages = Callable[[Mapping[str, float]], Mapping[str, float]]  # of the tasks' means, by name


class Cost(NamedTuple):
    """A field of the records, and how its mean over the samples is shown."""

    field: str
    heading: str
    scale: float
    digits: int


COSTS = (
    Cost("prefill_flops", "prefill FLOPs %", 100, 1),  # a share of full context's
    Cost("kv_bytes", "KV bytes %", 100, 1),  # a share of full context's
    Cost("nll", "nats/token", 1, 3),  # of a text that goes on after what was kept
    Cost("ttft_s", "TTFT s", 1, 3),  # seconds to the first token
    Cost("token_s", "ms/token", 1000, 1),  # seconds of each later one
)


@dataclass(frozen=True)
class Run:
    """Records under a name, such as a method and its budget; see `records.merged`."""

    name: str
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Mean:
    """Of a task's scores, x100."""

    mean: float
    low: float | None  # ends of the interval, if there is one
    high: float | None
    samples: int


@dataclass(frozen=True)
class Row:
    """A run's means. Samples that failed or have no score are in none of them."""

    name: str
    tasks: dict[str, Mean]
    averages: dict[str, float]  # x100
    costs: dict[str, float]  # by the records' field, in its unit
    compiled: int | None  # programs
    samples: int
    failed: int


def rows_of(
    runs: Sequence[Run],
    *,
    averages: Averages = lambda means: {},
    interval: Interval | None = None,
    task_of: Callable[[Mapping[str, Any]], str] = lambda record: record["task"],
) -> list[Row]:
    """A row for each run. `averages` sees means x100; `task_of` names the column a record counts for."""
    return [_row(run, averages, interval, task_of) for run in runs]


def _row(run: Run, averages: Averages, interval: Interval | None, task_of: Callable[[Mapping[str, Any]], str]) -> Row:
    scores: dict[str, list[float]] = defaultdict(list)
    good = [record for record in run.records if "error" not in record]
    for record in good:
        if record.get("score") is not None:
            scores[task_of(record)].append(record["score"])
    tasks = {task: _mean(values, interval) for task, values in scores.items()}
    costs = {}
    for cost in COSTS:
        values = [record[cost.field] for record in good if record.get(cost.field) is not None]
        if values:
            costs[cost.field] = sum(values) / len(values)
    # `compiled` is of the batch, and stands in the records of all its rows
    compiled = [record["compiled"] / record.get("rows", 1) for record in good if "compiled" in record]
    return Row(
        run.name,
        tasks,
        dict(averages({task: mean.mean for task, mean in tasks.items()})),
        costs,
        round(sum(compiled)) if compiled else None,
        len(run.records),
        len(run.records) - len(good),
    )


def _mean(scores: Sequence[float], interval: Interval | None) -> Mean:
    low, high = interval(scores) if interval is not None else (None, None)
    return Mean(
        100 * sum(scores) / len(scores),
        None if low is None else 100 * low,
        None if high is None else 100 * high,
        len(scores),
    )


# --------------------------------------------------------------------------------------------------------- as text


def as_text(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal."""
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "".join(
        "  ".join(to(cell, width) for to, cell, width in zip(sides, line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    head, *lines = [[cell.replace("|", "\\|") for cell in line] for line in _cells(rows)]
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def as_csv(rows: Sequence[Row]) -> str:
    """Numbers in full; the ends of a task's interval, if there is any, have columns of their own."""
    tasks, averages = _names(rows)
    ends = any(mean.low is not None for row in rows for mean in row.tasks.values())
    head = ["name"]
    for task in tasks:
        head += [task, f"{task} low", f"{task} high"] if ends else [task]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *averages, *(cost.field for cost in COSTS), "compiled", "samples", "failed"])
    for row in rows:
        cells: list[Any] = [row.name]
        for task in tasks:
            mean = row.tasks.get(task)
            numbers = [None] * 3 if mean is None else [mean.mean, mean.low, mean.high]
            cells += numbers if ends else numbers[:1]
        cells += [row.averages.get(name) for name in averages] + [row.costs.get(cost.field) for cost in COSTS]
        writer.writerow([*cells, row.compiled, row.samples, row.failed])
    return out.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """The rows as they are."""
    return json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Tasks and averages of any row, in the order they come."""
    return list({task: 0 for row in rows for task in row.tasks}), list({n: 0 for row in rows for n in row.averages})


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """A heading and a line for each row; what a run lacks is empty."""
    tasks, averages = _names(rows)
    lines = [["run", *tasks, *averages, *(cost.heading for cost in COSTS), "compiled", "samples", "failed"]]
    for row in rows:
        cells = [row.name, *(_show(row.tasks.get(task)) for task in tasks)]
        cells += [f"{row.averages[name]:.1f}" if name in row.averages else "" for name in averages]
        for cost in COSTS:
            value = row.costs.get(cost.field)
            cells.append("" if value is None else f"{value * cost.scale:.{cost.digits}f}")
        lines.append([*cells, "" if row.compiled is None else str(row.compiled), str(row.samples), str(row.failed)])
    return lines


def _show(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{mean.mean:.1f}" + ("" if mean.low is None else f" [{mean.low:.1f}, {mean.high:.1f}]")
