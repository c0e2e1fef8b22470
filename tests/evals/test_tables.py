"""A row for each run; what is missing stays empty, what failed is counted and in no mean."""

import csv
import io
import json

import pytest

from fastkv_jax.evals.tables import Run, as_csv, as_json, as_markdown, as_text, rows_of

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
    {"task": "text", "id": "1", "score": None, "kv_bytes": 0.3},
]


@pytest.fixture
def rows():
    return rows_of(
        [Run("full", FULL), Run("fastkv | 10 %", FASTKV)],
        averages=lambda means: {"average": sum(means.values()) / len(means)},
        interval=lambda scores: (min(scores), max(scores)),
    )


def test_rows(rows):
    full, fastkv = rows
    assert {task: mean.mean for task, mean in full.tasks.items()} == {"qa": 75.0, "code": 50.0}
    assert (full.tasks["qa"].low, full.tasks["qa"].high, full.tasks["qa"].samples) == (50.0, 100.0, 2)
    assert full.averages == {"average": 62.5} and full.compiled == 4  # of one batch of two rows
    assert full.costs == {"prefill_flops": 1.0, "kv_bytes": 1.0, "ttft_s": 1.0, "token_s": 0.02}
    assert list(fastkv.tasks) == ["qa"] and fastkv.tasks["qa"].samples == 1
    assert fastkv.costs == {"kv_bytes": pytest.approx(0.2)} and fastkv.compiled is None
    assert (fastkv.samples, fastkv.failed, full.failed) == (4, 2, 0)


def test_text(rows):
    head, full, fastkv = as_text(rows).splitlines()
    assert full.startswith("full           75.0 [50.0, 100.0]  50.0 [25.0, 75.0]     62.5            100.0  ")
    for heading, one, two in [
        ("qa", "[50.0, 100.0]", "0.0 [0.0, 0.0]"),
        ("code", "50.0 [25.0, 75.0]", "  "),
        ("KV bytes %", "100.0", "20.0"),
        ("TTFT s", "1.000", "  "),
        ("ms/token", "20.0", "  "),
        ("compiled", "4", "  "),
        ("failed", "0", "2"),
    ]:
        end = head.index(heading) + len(heading)  # numbers end where their heading does
        assert head[:end].endswith(heading) and full[:end].endswith(one) and fastkv[:end].endswith(two)


def test_markdown(rows):
    head, rule, full, fastkv = as_markdown(rows).splitlines()
    assert head.startswith("| run | qa | code | average | prefill FLOPs % |") and rule.startswith("| :-- | --: |")
    assert full.startswith("| full | 75.0 [50.0, 100.0] | 50.0 [25.0, 75.0] | 62.5 | 100.0 |")
    assert fastkv == r"| fastkv \| 10 % | 0.0 [0.0, 0.0] |  | 0.0 |  | 20.0 |  |  |  |  | 4 | 2 |"


def test_csv(rows):
    full, fastkv = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (full["qa"], full["qa low"], full["qa high"], full["average"]) == ("75.0", "50.0", "100.0", "62.5")
    assert full["token_s"] == "0.02" and full["compiled"] == "4"
    assert (fastkv["name"], fastkv["code"], fastkv["code low"], fastkv["ttft_s"]) == ("fastkv | 10 %", "", "", "")
    assert fastkv["failed"] == "2"
    plain = as_csv(rows_of([Run("full", FULL)]))
    assert plain.splitlines()[0] == "name,qa,code,prefill_flops,kv_bytes,nll,ttft_s,token_s,compiled,samples,failed"
    assert plain.splitlines()[1] == "full,75.0,50.0,1.0,1.0,,1.0,0.02,4,4,0"


def test_json(rows):
    full, fastkv = json.loads(as_json(rows))
    assert full["tasks"]["qa"] == {"mean": 75.0, "low": 50.0, "high": 100.0, "samples": 2}
    assert fastkv["failed"] == 2 and "code" not in fastkv["tasks"] and fastkv["compiled"] is None


def test_without_intervals_and_by_group():
    (row,) = rows_of([Run("full", FULL)], task_of=lambda record: record.get("group", "all"))
    assert {name: mean.mean for name, mean in row.tasks.items()} == {"all": 75.0, "8K": 25.0, "4K": 75.0}
    assert "75.0 " in as_text([row]) and "[" not in as_text([row])


def test_runs_of_nothing():
    rows = rows_of([Run("all failed", [FASTKV[1]]), Run("empty", [])])
    assert [row.failed for row in rows] == [1, 0] and all(not row.tasks and not row.costs for row in rows)
    assert as_text(rows).splitlines()[1].split() == ["all", "failed", "1", "1"]
