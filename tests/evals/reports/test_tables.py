"""A row for each run; what is missing stays empty, what failed is counted and in no mean."""

import csv
import io
import json

import pytest

from fastkv_jax.evals.reports.averages import of_tasks
from fastkv_jax.evals.reports.tables import Run, as_csv, as_json, as_markdown, as_text, rows_of

FULL = [
    {"task": "qa", "id": "1", "score": 1.0, "prefill_flops": 1.0, "kv_bytes": 1.0, "ttft_s": 0.5, "token_s": 0.02},
    {"task": "qa", "id": "2", "score": 0.5, "prefill_flops": 1.0, "kv_bytes": 1.0, "ttft_s": 1.5, "token_s": 0.02},
    {"task": "code", "id": "1", "score": 0.25, "compiled": 4, "rows": 2, "group": "8K"},
    {"task": "code", "id": "2", "score": 0.75, "compiled": 4, "rows": 2, "group": "4K"},
]
FASTKV = [
    {"task": "qa", "id": "1", "score": 0.0, "kv_bytes": 0.1},
    {"task": "qa", "id": "2", "error": "out of memory"},
    {"task": "code", "id": "1", "error": "out of memory"},
    {"task": "text", "id": "1", "score": None, "nll": 2.5, "kv_bytes": 0.3},
]


@pytest.fixture
def rows():
    return rows_of([Run("full", FULL), Run("fastkv | 10 %", FASTKV)], lambda records: {"average": of_tasks(records)})


def test_rows(rows):
    full, fastkv = rows
    assert {task: mean.mean for task, mean in full.tasks.items()} == {"qa": 75.0, "code": 50.0}
    assert (full.tasks["qa"].low, full.tasks["qa"].high, full.tasks["qa"].samples) == (50.0, 100.0, 2)
    assert full.averages == {"average": of_tasks(FULL)} and full.averages["average"].mean == 62.5
    assert full.compiled == 4  # of one batch of two rows
    assert full.costs == {"prefill_flops": 1.0, "kv_bytes": 1.0, "ttft_s": 1.0, "token_s": 0.02}
    assert list(fastkv.tasks) == ["qa"] and fastkv.tasks["qa"].samples == 1
    assert fastkv.averages["average"].samples == 1 and full.nats is None and fastkv.nats.mean == 2.5
    assert fastkv.costs == {"kv_bytes": pytest.approx(0.2)} and fastkv.compiled is None
    assert (fastkv.samples, fastkv.failed, full.failed) == (4, 2, 0)


def test_text_is_averages_and_costs_then_tasks(rows):
    averages, tasks = (part.splitlines() for part in as_text(rows).split("\n\n"))
    assert len(averages) == len(tasks) == 3
    cells = [
        (averages, "average", "62.5 [37.5, 87.5]", "0.0 [0.0, 0.0]"),
        (averages, "nats/token", "  ", "2.500 [2.500, 2.500]"),
        (averages, "KV bytes %", "100.0", "20.0"),
        (averages, "TTFT s", "1.000", "  "),
        (averages, "ms/token", "20.0", "  "),
        (averages, "compiled", "4", "  "),
        (averages, "failed", "0", "2"),
        (tasks, "qa", "75.0 [50.0, 100.0]", "0.0 [0.0, 0.0]"),
        (tasks, "code", "50.0 [25.0, 75.0]", ""),
    ]
    for (head, full, fastkv), heading, one, two in cells:
        end = head.index(heading) + len(heading)  # numbers end where their heading does
        assert head[:end].endswith(heading) and full[:end].endswith(one) and fastkv[:end].endswith(two)


def test_markdown_is_averages_and_costs_then_tasks(rows):
    averages, tasks = (part.splitlines() for part in as_markdown(rows).split("\n\n"))
    head, rule, full, fastkv = averages
    assert head.startswith("| run | average | nats/token | prefill FLOPs % |") and rule.startswith("| :-- | --: |")
    assert full == "| full | 62.5 [37.5, 87.5] |  | 100.0 | 100.0 | 1.000 | 20.0 | 4 | 4 | 0 |"
    assert fastkv == r"| fastkv \| 10 % | 0.0 [0.0, 0.0] | 2.500 [2.500, 2.500] |  | 20.0 |  |  |  | 4 | 2 |"
    assert tasks == [
        "| run | qa | code |",
        "| :-- | --: | --: |",
        "| full | 75.0 [50.0, 100.0] | 50.0 [25.0, 75.0] |",
        r"| fastkv \| 10 % | 0.0 [0.0, 0.0] |  |",
    ]


def test_csv_is_one_table_with_numbers_in_full(rows):
    full, fastkv = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (full["qa"], full["qa low"], full["qa high"], full["average"]) == ("75.0", "50.0", "100.0", "62.5")
    assert full["token_s"] == "0.02" and full["compiled"] == "4" and full["nll"] == "" and fastkv["nll"] == "2.5"
    assert (fastkv["name"], fastkv["code"], fastkv["code low"], fastkv["ttft_s"]) == ("fastkv | 10 %", "", "", "")
    assert (fastkv["average low"], fastkv["failed"]) == ("0.0", "2")
    costs = ["prefill_flops", "kv_bytes", "ttft_s", "token_s", "compiled", "samples", "failed"]
    assert list(full)[-10:] == ["nll", "nll low", "nll high", *costs]


def test_json(rows):
    full, fastkv = json.loads(as_json(rows))
    assert full["tasks"]["qa"] == {"mean": 75.0, "low": 50.0, "high": 100.0, "samples": 2}
    assert fastkv["failed"] == 2 and "code" not in fastkv["tasks"] and fastkv["compiled"] is None


def test_runs_of_nothing():
    rows = rows_of([Run("all failed", [FASTKV[1]]), Run("empty", [])])
    assert [row.failed for row in rows] == [1, 0] and all(not row.tasks and not row.costs for row in rows)
    assert as_text(rows).splitlines()[1].split() == ["all", "failed", "1", "1"]
