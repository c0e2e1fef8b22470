"""Records are read back once each, or the damage is named."""

import json
import math
from pathlib import Path

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from fake_evaluation import evaluate
from fastkv_jax.errors import InputError
from fastkv_jax.evals.records.records import as_line, hash_of, load, merged, parts

HASH = "h"


def line(task: str = "t", identity: str = "1", **more: object) -> bytes:
    return as_line({"task": task, "id": identity, "config_hash": HASH, **more})


def write(folder: Path, name: str, content: bytes) -> epath.Path:
    (folder / name).write_bytes(content)
    return epath.Path(folder)


def test_records_of_all_parts_and_processes(tmp_path):
    write(tmp_path, "part-0-1.jsonl", line("a") + line("b"))
    write(tmp_path, "part-0-10.jsonl", line("c"))
    write(tmp_path, "part-1-2.jsonl", b"")
    write(tmp_path, "part-1-2.jsonl~", b"an editor's")
    folder = write(tmp_path, "part-0-9.jsonl", line("a", "2"))
    assert [(part.process, part.number) for part in parts(folder)] == [(0, 1), (0, 9), (0, 10), (1, 2)]
    found = load(folder, HASH)
    assert list(found.records) == [("a", "1"), ("b", "1"), ("a", "2"), ("c", "1")] and not found.torn


@pytest.mark.parametrize("cut", range(1, len(line("é"))))
def test_a_cut_last_line_is_dropped(cut: int, tmp_path):
    whole = line("a") + line("b", text="\r\u2028")
    found = load(write(tmp_path, "part-0-1.jsonl", whole + line("é")[:cut]), HASH)
    assert list(found.records) == [("a", "1"), ("b", "1")]
    (torn,) = found.torn
    assert (torn.line, torn.whole) == (3, len(whole)) and "part-0-1.jsonl, line 3" in str(torn)


@pytest.mark.parametrize("damage", [b"\n", b"\0" * 9 + b"\n", b"\xff\n", line()[:-9] + line("b"), b'{"task": NaN}\n'])
def test_a_damaged_line_in_the_middle_is_refused(damage: bytes, tmp_path):
    folder = write(tmp_path, "part-3-1.jsonl", line("a") + damage + line("c"))
    with pytest.raises(InputError, match=r"part-3-1\.jsonl, line 2, is damaged"):
        load(folder, HASH)
    write(tmp_path, "part-3-1.jsonl", line("a") + damage)
    assert [torn.line for torn in load(folder, HASH).torn] == [2]
    write(tmp_path, "part-3-2.jsonl", b"")  # no longer the newest
    with pytest.raises(InputError, match=r"part-3-1\.jsonl, line 2"):
        load(folder, HASH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line("a") + line("a"), "line 2: a second record of a 1"),
        (b"[]\n", "line 1, is no record"),
        (b'{"task": "a", "id": 1, "config_hash": "h"}\n', "line 1, is no record"),
        (as_line({"task": "a", "id": "1", "config_hash": "other"}), "line 1, is a record of another configuration"),
    ],
)
def test_what_is_no_record_of_this_run_is_refused(content: bytes, message: str, tmp_path):
    with pytest.raises(InputError, match=rf"part-0-1\.jsonl, {message}"):
        load(write(tmp_path, "part-0-1.jsonl", content), HASH)


def test_a_second_record_in_another_part_is_refused(tmp_path):
    write(tmp_path, "part-0-1.jsonl", line("a"))
    with pytest.raises(InputError, match=r"part-1-1\.jsonl, line 1: a second record"):
        load(write(tmp_path, "part-1-1.jsonl", line("a")), HASH)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {1}, "\ud800"])
def test_what_json_lacks_is_refused_with_the_samples_name(value):
    with pytest.raises(ValueError, match="record of t 1 is not JSON"):
        line(more=[value])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(value=json_values.filter(lambda v: "\\ud" not in json.dumps(v)))
def test_a_record_is_one_line_that_is_read_back(value):
    written = line(value=value)
    assert written.count(b"\n") == 1 and json.loads(written)["value"] == value


def test_a_hash_does_not_depend_on_the_order_of_keys():
    assert hash_of({"a": 1, "b": {"c": 2, "d": 3}}) == hash_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert hash_of({"a": 1}) != hash_of({"a": 1.5})


def test_merging_needs_a_finished_run(tmp_path):
    with pytest.raises(InputError, match=r"no evaluation: there is no run\.json"):
        merged(tmp_path)
    evaluate(tmp_path / "run", process=1, processes=3)
    with pytest.raises(InputError, match="40 of 60 samples have no record yet"):
        merged(tmp_path / "run")
    (tmp_path / "run/samples.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"samples\.json is damaged"):
        merged(tmp_path / "run")
    (tmp_path / "run/samples.json").unlink()
    with pytest.raises(InputError, match=r"there is no samples\.json"):
        merged(tmp_path / "run")
