"""Several runs beside each other, a row each: what they scored and what it cost. For terminals, Markdown, CSV, JSON."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastkv_jax.evals.reports.averages import Average, by_task, likelihood

Averages = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Average]]  # of records with a score, by heading


class Cost(NamedTuple):
    """A field of the records, and how its mean over the samples is shown."""

    field: str
    heading: str
    scale: float
    digits: int


COSTS = (
    Cost("prefill_flops", "prefill FLOPs %", 100, 1),  # a share of full context's
    Cost("kv_bytes", "KV bytes %", 100, 1),  # a share of full context's
    Cost("ttft_s", "TTFT s", 1, 3),  # seconds to the first token
    Cost("token_s", "ms/token", 1000, 1),  # seconds of each later one
)


@dataclass(frozen=True)
class Run:
    """Records under a name, such as a method and its budget; see `records.merged`."""

    name: str
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A run's means. Samples that failed or have no score are in none of them."""

    name: str
    tasks: dict[str, Average]
    averages: dict[str, Average]
    nats: Average | None  # per token, of texts that go on after what was kept
    costs: dict[str, float]  # by the records' field, in its unit
    compiled: int | None  # programs
    samples: int
    failed: int


def rows_of(runs: Sequence[Run], averages: Averages = lambda records: {}) -> list[Row]:
    """A row for each run."""
    return [_row(run, averages) for run in runs]


def _row(run: Run, averages: Averages) -> Row:
    good = [record for record in run.records if "error" not in record]
    read_on = [record for record in good if record.get("nll") is not None]
    scored = [record for record in good if record.get("score") is not None]
    costs = {}
    for cost in COSTS:
        values = [record[cost.field] for record in good if record.get(cost.field) is not None]
        if values:
            costs[cost.field] = sum(values) / len(values)
    # `compiled` is of the batch, and stands in the records of all its rows
    compiled = [record["compiled"] / record.get("rows", 1) for record in good if "compiled" in record]
    return Row(
        run.name,
        by_task(scored) if scored else {},
        dict(averages(scored)) if scored else {},
        likelihood(read_on) if read_on else None,
        costs,
        round(sum(compiled)) if compiled else None,
        len(run.records),
        len(run.records) - len(good),
    )


# --------------------------------------------------------------------------------------------------------- as text


def as_text(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal: averages and costs, then the tasks."""
    return "\n".join(map(_aligned, _parts(rows)))


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "".join(
        "  ".join(to(cell, width) for to, cell, width in zip(sides, line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """Tables in Markdown: averages and costs, then the tasks."""
    return "\n".join(map(_piped, _parts(rows)))


def _piped(lines: list[list[str]]) -> str:
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rest))


def as_csv(rows: Sequence[Row]) -> str:
    """Numbers in full, one table; the ends of an interval have columns of their own."""
    averages, tasks = _names(rows)
    head = ["name"]
    for name in (*tasks, *averages):
        head += [name, f"{name} low", f"{name} high"]
    head += ["nll", "nll low", "nll high"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *(cost.field for cost in COSTS), "compiled", "samples", "failed"])
    for row in rows:
        cells: list[Any] = [row.name]
        for mean in (*map(row.tasks.get, tasks), *map(row.averages.get, averages), row.nats):
            cells += [None] * 3 if mean is None else [mean.mean, mean.low, mean.high]
        cells += [row.costs.get(cost.field) for cost in COSTS]
        writer.writerow([*cells, row.compiled, row.samples, row.failed])
    return out.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """The rows as they are."""
    return json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Averages and tasks of any row, in the order they come."""
    return list({name: 0 for row in rows for name in row.averages}), list({n: 0 for row in rows for n in row.tasks})


def _parts(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Tables with a heading and a line for each row; what a run lacks is empty, what all lack is left out."""
    averages, tasks = _names(rows)
    costs = [cost for cost in COSTS if any(cost.field in row.costs for row in rows)]
    nats = ["nats/token"] * any(row.nats is not None for row in rows)
    whole = [["run", *averages, *nats, *(cost.heading for cost in costs), "compiled", "samples", "failed"]]
    apart = [["run", *tasks]]
    for row in rows:
        cells = [_show(row.averages.get(name)) for name in averages] + [_show(row.nats, 3)] * len(nats)
        for cost in costs:
            value = row.costs.get(cost.field)
            cells.append("" if value is None else f"{value * cost.scale:.{cost.digits}f}")
        compiled = "" if row.compiled is None else str(row.compiled)
        whole.append([row.name, *cells, compiled, str(row.samples), str(row.failed)])
        apart.append([row.name, *(_show(row.tasks.get(task)) for task in tasks)])
    return [whole, apart] if tasks else [whole]


def _show(mean: Average | None, digits: int = 1) -> str:
    return "" if mean is None else f"{mean.mean:.{digits}f} [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"
