"""A run's folder: refused before any work if results cannot go there, and never written by two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

import fake_evaluation
import moments
from fake_evaluation import CONFIG, FakeEngine, evaluate, samples, without_timings
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.evals.records import folder, parts
from fastkv_jax.evals.records.folder import check_output, opened
from fastkv_jax.evals.records.records import merged


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    target = tmp_path_factory.mktemp("undisturbed") / "run"
    evaluate(target)
    return without_timings(merged(target))


# ------------------------------------------------------------------------------------------------ what is refused


def test_outputs_that_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_text("x")
    for path, message in [
        (tmp_path / "file", "file: it is a file; give a folder"),
        (tmp_path / "photos", r"holds cat\.png but no run\.json"),
        ("nonsense://x", "on a disk, gs:// or s3://"),
    ]:
        with pytest.raises(InputError, match=message), opened(path, CONFIG):
            pass
    with pytest.raises(OSError, match="file"), opened(tmp_path / "file" / "run", CONFIG):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"] and os.listdir(tmp_path / "photos") == ["cat.png"]


def test_gs_without_gcsfs_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(InputError, match=r"cannot write to gs://b/run: .*fastkv-jax\[gcs\]"):
        check_output("gs://b/run")


def test_a_folder_of_nothing_but_our_scraps_is_fine(tmp_path):
    (tmp_path / ".writingabc").mkdir()
    (tmp_path / ".lock").touch()
    with opened(tmp_path, CONFIG):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "other", "config_hash": "x"}'])
def test_a_run_json_that_is_not_ours_is_refused(content: str, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json is damaged"), opened(tmp_path, CONFIG):
        pass
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize(("process", "processes"), [(-1, 1), (1, 1), (0, 0)])
def test_a_process_that_cannot_be_is_refused(process, processes, tmp_path):
    with pytest.raises(FastKVConfigError, match="process must be"):
        evaluate(tmp_path, process=process, processes=processes)


def test_another_configuration_is_refused_unless_overwritten(tmp_path, undisturbed):
    evaluate(tmp_path, asked=samples(20), config={"method": "snapkv", "rate": 0.1})
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match='method "snapkv" there, "fake" here; rate 0.1 there, null here; protocol'):
        evaluate(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    evaluate(tmp_path, overwrite=True)
    assert without_timings(merged(tmp_path)) == undisturbed
    engine = FakeEngine()
    evaluate(tmp_path, engine, overwrite=True)  # of the same configuration nothing is removed
    assert not engine.batches


@pytest.mark.parametrize("before", [None, {"method": "snapkv"}])
def test_killed_at_any_moment_the_same_command_ends_as_if_undisturbed(before, tmp_path, undisturbed):
    """Also where results of another configuration are being removed."""
    if before is not None:
        evaluate(tmp_path / "run", asked=samples(20), config=before)
    with moments.copied(tmp_path / "run", tmp_path / "copies"):
        evaluate(tmp_path / "run", overwrite=True)
    states = sorted((tmp_path / "copies").iterdir())
    assert len(states) > 10
    for state in states:
        evaluate(state, overwrite=True)
        assert without_timings(merged(state)) == undisturbed
        assert moments.content(state).keys() <= {*moments.content(tmp_path / "run"), "part-0-2.jsonl"}


def test_nothing_is_overwritten_while_another_process_writes(tmp_path):
    with opened(tmp_path, {"other": 1}, process=1, processes=2):
        with pytest.raises(InputError, match="in use by process"):
            evaluate(tmp_path, overwrite=True, processes=2)
    assert json.loads((tmp_path / "run.json").read_text())["config"] == {"other": 1}


def test_other_samples_are_refused(tmp_path):
    evaluate(tmp_path)
    for asked in (samples()[:-1], samples()[::-1]):
        with pytest.raises(InputError, match="is of other samples"):
            evaluate(tmp_path, asked=asked)
    with pytest.raises(InputError, match="there are no samples"):
        evaluate(tmp_path / "none", asked=[])
    with pytest.raises(InputError, match="two samples are called needle 0"):
        evaluate(tmp_path / "twice", asked=samples() + samples(1))


def test_run_json_says_what_was_run(tmp_path):
    evaluate(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"] == {**CONFIG, "budgets": [1, 2]} and {"python", "jax", "numpy"} <= run["versions"].keys()
    (tmp_path / "run.json").write_text(json.dumps({**run, "versions": {**run["versions"], "jax": "0.1"}}))
    with opened(tmp_path, CONFIG) as output:
        (note,) = output.notes
    assert 'other versions began: jax "0.1" there' in note


# ---------------------------------------------------------------------------------------------------------- locks


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    command = [sys.executable, fake_evaluation.__file__, str(tmp_path / "run"), "0.001"]
    with opened(tmp_path / "run", CONFIG, process=0, processes=1):
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        other_share = subprocess.run([*command, "1", "2"], capture_output=True, text=True, timeout=60)
    for refused in (second, other_share):
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith("error:") and f"is in use by process {os.getpid()} on " in refused.stderr
    assert subprocess.run(command, timeout=60).returncode == 0


def test_shares_of_one_division_are_written_side_by_side(tmp_path):
    with opened(tmp_path, CONFIG, process=0, processes=2):
        with opened(tmp_path, CONFIG, process=1, processes=2):
            pass
        with pytest.raises(InputError, match="in use"), opened(tmp_path, CONFIG, process=0, processes=2):
            pass
    with opened(tmp_path, CONFIG, process=2, processes=3):  # divided anew when nobody writes
        pass


# ------------------------------------------------------------------------------------------------- object stores


class Bucket(MemoryFileSystem):
    """An object store: objects are written whole; appending, as gcsfs does it, would lose what is there."""

    cachable = False

    def open(self, path, mode="rb", **kwargs):
        assert mode in ("r", "rb", "w", "wb"), mode
        return super().open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    found = Bucket(global_store=False)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: found)
    return found


def names(bucket: Bucket) -> list[str]:
    return sorted(path.rsplit("/", 1)[1] for path in bucket.find("gs://b/run"))


def test_an_object_store_gets_whole_parts(bucket, undisturbed):
    class Killed(BaseException):
        pass

    def kill(batch):
        if len(engine.batches) > 10:
            raise Killed
        return False

    engine = FakeEngine(fails=kill)
    with pytest.raises(Killed):
        evaluate("gs://b/run", engine)
    assert names(bucket) == ["part-0-1.jsonl", "run.json", "samples.json"]  # flushed, and the marker is gone
    engine = FakeEngine()
    summary = evaluate("gs://b/run", engine)
    assert summary.found + summary.answered == 60 and summary.found > 10
    assert {"part-0-1.jsonl", "part-0-2.jsonl", "results.jsonl"} < set(names(bucket))
    assert without_timings(merged("gs://b/run")) == undisturbed


@pytest.mark.parametrize(("every", "seconds", "count"), [(7, 1e9, 9), (1000, 1e9, 1), (1000, 0.0, 60)])
def test_parts_are_written_by_number_and_by_time(every, seconds, count, bucket, undisturbed, monkeypatch):
    monkeypatch.setattr(
        folder,
        "RemoteParts",
        lambda *where: parts.RemoteParts(*where, every=every, seconds=seconds),
    )
    evaluate("gs://b/run")
    assert len(bucket.find("gs://b/run")) == count + 3
    assert without_timings(merged("gs://b/run")) == undisturbed


def test_on_an_object_store_a_marker_is_in_the_way_until_taken_over(bucket, undisturbed):
    with opened("gs://b/run", CONFIG):
        marker = bucket.cat("gs://b/run/.lock-0-of-1")
    bucket.pipe("gs://b/run/.lock-0-of-1", marker)  # as kill -9 leaves it
    for process, processes in ((0, 1), (1, 2)):
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .*; if .* dead, give --take-over"):
            evaluate("gs://b/run", process=process, processes=processes)
    evaluate("gs://b/run", take_over=True)
    assert without_timings(merged("gs://b/run")) == undisturbed
    assert ".lock-0-of-1" not in names(bucket)


def test_whoever_was_taken_over_and_lives_writes_over_nothing(bucket):
    with pytest.raises(OSError, match=r"part-0-1\.jsonl was written by another process"):
        with opened("gs://b/run", CONFIG) as first:
            evaluate("gs://b/run", take_over=True)
            first.add({"task": "needle", "id": "0", "config_hash": first.config_hash})
    assert len(merged("gs://b/run")) == 60


def test_overwriting_on_an_object_store(bucket, undisturbed):
    evaluate("gs://b/run", asked=samples(9), config={"other": 1})
    with pytest.raises(InputError, match="another configuration"):
        evaluate("gs://b/run")
    evaluate("gs://b/run", overwrite=True)
    assert without_timings(merged("gs://b/run")) == undisturbed


def test_a_cut_part_copied_to_an_object_store_is_repaired(bucket, tmp_path, undisturbed):
    evaluate(tmp_path)
    for name in ("run.json", "samples.json", "part-0-1.jsonl"):
        bucket.pipe(f"gs://b/run/{name}", Path(tmp_path, name).read_bytes()[: -5 if "part" in name else None])
    evaluate("gs://b/run")
    evaluate("gs://b/run")
    assert without_timings(merged("gs://b/run")) == undisturbed
