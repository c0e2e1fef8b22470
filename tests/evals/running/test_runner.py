"""Every sample is answered once, however often the run is killed, and its record is what it would have been."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

import fake_evaluation
from fake_evaluation import CONFIG, FakeEngine, evaluate, samples, without_timings
from fastkv_jax import files
from fastkv_jax.buckets import bucket_for
from fastkv_jax.errors import FastKVConfigError, InputError, Terminated
from fastkv_jax.evals.records import parts as writers
from fastkv_jax.evals.records.folder import opened
from fastkv_jax.evals.records.records import merged, parts
from fastkv_jax.evals.running import progress, runner
from fastkv_jax.evals.running.signals import deferred_signals
from fastkv_jax.evals.sample import Sample
from fastkv_jax.evals.suites.scorers import Scored


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    target = tmp_path_factory.mktemp("undisturbed") / "run"
    evaluate(target)
    return without_timings(merged(target))


def command(folder: Path, seconds: float = 0.0, *share: int) -> list[str]:
    return [sys.executable, fake_evaluation.__file__, str(folder), str(seconds), *map(str, share)]


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("part-*"))


def wait_for(folder: Path, count: int, process: subprocess.Popen) -> None:
    while lines(folder) < count and process.poll() is None:
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------------- records


def test_records_are_complete(tmp_path, undisturbed):
    summary = evaluate(tmp_path, save_prompts=True)
    assert summary == runner.Summary(samples=60, answered=60, found=0, failed=0, missing=0)
    asked = samples()
    for sample, record in zip(asked, merged(tmp_path), strict=True):
        whole = len((sample.context + sample.question).encode())
        assert (record["task"], record["id"], record["group"]) == (sample.task, sample.id, sample.group)
        assert (record["whole_tokens"], record["prompt_tokens"]) == (whole, min(whole, 650))
        assert record["prompt"] == sample.context + sample.question and record["protocol"] == "test"
        assert 0 <= record["score"] <= 1 and record["finish"] == "stop" and "ttft_s" in record
        assert record.get("problem") == ("odd" if sample.id == "7" else None)
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 60
    for record, other in zip(merged(tmp_path), undisturbed, strict=True):
        assert record.pop("prompt") and without_timings([record]) == [other]


def test_what_is_done_is_not_done_again(tmp_path):
    evaluate(tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    engine, said = FakeEngine(), []
    summary = evaluate(tmp_path, engine, report=said.append)
    assert (summary.answered, summary.found) == (0, 60) and not engine.batches
    assert said == ["60 of 60 samples were answered before"]
    assert (tmp_path / "results.jsonl").read_bytes() == before and len(parts(tmp_path)) == 1


def test_problems_of_all_prompts_are_told_before_any_is_answered(tmp_path):
    class Refusing(FakeEngine):
        def encode(self, sample):
            if int(sample.id) % 12 == 3:
                raise InputError(f"too long by {sample.id}")
            return super().encode(sample)

    engine = Refusing()
    with pytest.raises(InputError, match=r"5 of 60 .*needle 3: too long by 3; .* 15; .* 27; \.\.\.$"):
        evaluate(tmp_path, engine)
    assert not engine.batches and not parts(tmp_path)


def test_a_prompt_that_changed_is_refused(tmp_path):
    evaluate(tmp_path)

    class Other(FakeEngine):
        def encode(self, sample):
            encoded = super().encode(sample)
            return encoded._replace(tokens=encoded.tokens[:-1]) if sample.id == "41" else encoded

    with pytest.raises(InputError, match=" 41 was answered with another prompt"):
        evaluate(tmp_path, Other())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(bad: float, tmp_path, undisturbed):
    def score(sample, answer):
        return Scored(bad) if sample.id == "20" else fake_evaluation.score(sample, answer)

    with pytest.raises(ValueError, match=f"the score of needle 20 is {bad}"):
        evaluate(tmp_path, score=score)
    assert b"NaN" not in (tmp_path / "part-0-1.jsonl").read_bytes()
    evaluate(tmp_path)  # mended, it goes on
    assert without_timings(merged(tmp_path)) == undisturbed


def test_what_has_no_score(tmp_path):
    evaluate(tmp_path, score=lambda sample, answer: None)
    assert {record["score"] for record in merged(tmp_path)} == {None}


def test_an_engine_must_not_write_the_runners_fields(tmp_path):
    class Cheating(FakeEngine):
        def answer(self, prompts):
            return [{**answer, "score": 1.0} for answer in super().answer(prompts)]

    with pytest.raises(ValueError, match=r"fields of the runner: \['score'\]"):
        evaluate(tmp_path, Cheating())


def test_too_few_answers_are_refused(tmp_path):
    class Forgetful(FakeEngine):
        def answer(self, prompts):
            return super().answer(prompts)[1:]

    with pytest.raises(ValueError, match=r"^\[\d\] answers to \d questions$"):
        evaluate(tmp_path, Forgetful())
    assert not parts(tmp_path)


@pytest.mark.parametrize("name", ["batch_tokens", "max_rows"])
def test_settings_that_are_refused(name, tmp_path):
    with pytest.raises(FastKVConfigError, match=f"{name} must be >= 1, got 0"):
        evaluate(tmp_path, **{name: 0})


# ------------------------------------------------------------------------------------------------------- batches


@given(
    lengths=st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([0, 8, 32])), max_size=60),
    batch_tokens=st.integers(1, 20000),
    max_rows=st.integers(1, 9),
)
def test_batches_are_of_one_shape_and_not_too_large(lengths, batch_tokens, max_rows):
    jobs = [
        runner.Job(Sample("t", str(i), "", "", (), new), array("i", [7] * n), 0, n)
        for i, (n, new) in enumerate(lengths)
    ]
    batches = runner.plan(jobs, batch_tokens, max_rows)
    assert sorted(int(job.sample.id) for batch in batches for job in batch) == list(range(len(jobs)))
    columns = [bucket_for(len(batch[0].tokens)) for batch in batches]
    assert columns == sorted(columns, reverse=True)
    for batch, width in zip(batches, columns, strict=True):
        answers = [job.sample.max_new_tokens for job in batch]
        assert {job.shape for job in batch} == {(width, answers[0] > 0)} and answers == sorted(answers, reverse=True)
        assert len(batch) == 1 or (len(batch) <= max_rows and len(batch) * width <= batch_tokens)
    full = {}
    for batch in batches:  # no more batches than needed
        full.setdefault(batch[0].shape, []).append(len(batch))
    for (width, _), counts in full.items():
        assert set(counts[:-1]) <= {max(1, min(max_rows, batch_tokens // width))}


def test_a_half_done_batch_is_answered_whole_and_recorded_once(tmp_path, undisturbed):
    evaluate(tmp_path)
    part = tmp_path / "part-0-1.jsonl"
    kept = part.read_bytes().splitlines(keepends=True)
    for count in (0, 1, 30, 59):
        part.write_bytes(b"".join(kept[:count]) + kept[count][:-1])
        said = []
        evaluate(tmp_path, report=said.append)
        assert f"part-0-1.jsonl, line {count + 1}, was cut" in said[0]
        assert without_timings(merged(tmp_path)) == undisturbed
        for later in parts(tmp_path)[1:]:
            later.path.unlink()


# ------------------------------------------------------------------------------------------------------ together


class Backwards(FakeEngine):
    """Another method: it says the same from its end."""

    def answer(self, prompts):
        return [{**answer, "prediction": answer["prediction"][::-1]} for answer in super().answer(prompts)]


class Company:
    """Both methods."""

    def __init__(self, **options: Any):
        self.engines = FakeEngine(**options), Backwards()
        self.encode = self.engines[0].encode

    def answer_all(self, batch):
        return [engine.answer(batch) for engine in self.engines]


def evaluate_together(folder: Path, company: Company | None = None) -> list[runner.Summary]:
    with opened(folder / "one", CONFIG) as one, opened(folder / "other", CONFIG) as other:
        return runner.run_together(
            samples(), company or Company(), [one, other], score=fake_evaluation.score, batch_tokens=1024, max_rows=4
        )


@pytest.fixture(scope="module")
def other_undisturbed(tmp_path_factory):
    target = tmp_path_factory.mktemp("undisturbed") / "run"
    evaluate(target, Backwards())
    return without_timings(merged(target))


def test_methods_that_answer_together_write_what_each_writes_alone(tmp_path, undisturbed, other_undisturbed):
    assert evaluate_together(tmp_path) == [runner.Summary(samples=60, answered=60, found=0, failed=0, missing=0)] * 2
    assert without_timings(merged(tmp_path / "one")) == undisturbed
    assert without_timings(merged(tmp_path / "other")) == other_undisturbed != undisturbed


def test_of_two_methods_one_was_interrupted(tmp_path, undisturbed, other_undisturbed):
    evaluate(tmp_path / "one")
    evaluate(tmp_path / "other", Backwards())
    part = tmp_path / "other" / "part-0-1.jsonl"
    kept = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(kept[:22]) + kept[22][:-1])
    (tmp_path / "other" / "results.jsonl").unlink()
    company = Company()
    one, other = evaluate_together(tmp_path, company)
    assert (one.found, one.answered, other.found, other.answered) == (60, 0, 22, 38)
    assert 38 <= sum(map(len, company.engines[0].batches)) < 42  # whole batches, and only those with something to do
    assert lines(tmp_path / "one") == lines(tmp_path / "other") == 60
    assert without_timings(merged(tmp_path / "one")) == undisturbed
    assert without_timings(merged(tmp_path / "other")) == other_undisturbed


def test_what_one_method_has_no_memory_for_fails_for_all(tmp_path):
    summaries = evaluate_together(tmp_path, Company(fails=lambda batch: any(p.sample.id == "5" for p in batch)))
    assert [summary.failed for summary in summaries] == [1, 1]
    for name in ("one", "other"):
        assert [record["id"] for record in merged(tmp_path / name) if "error" in record] == ["5"]


# ------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("RESOURCE_EXHAUSTED: 9 GB")])
def test_a_batch_too_large_is_halved_down_to_rows_that_are_recorded_as_failed(error, tmp_path, undisturbed):
    def fails(batch):
        if len(batch) > 2 or any(prompt.sample.id in ("5", "17") for prompt in batch):
            raise error
        return False

    engine = FakeEngine(fails=fails)
    summary = evaluate(tmp_path, engine)
    assert summary.failed == 2 and summary.missing == 0
    tried = [(len(batch), bucket_for(len(batch[0].tokens))) for batch in engine.batches]
    assert all(tried.count(size) == 1 for size in set(tried) if size[0] > 2)  # it is not tried again and again
    for record, other in zip(merged(tmp_path), undisturbed, strict=True):
        if record["id"] in ("5", "17"):
            assert record["error"] == "out of memory" and "score" not in record and "prediction" not in record
        else:
            assert record["prediction"] == other["prediction"] and record["rows"] <= 2
    again = FakeEngine()
    assert evaluate(tmp_path, again).failed == 2 and not again.batches  # failed is done


def test_other_errors_end_the_run_and_lose_nothing(tmp_path, undisturbed):
    def fails(batch):
        if any(prompt.sample.id == "30" for prompt in batch):
            raise RuntimeError("broken")
        return False

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(tmp_path, FakeEngine(fails=fails))
    done = lines(tmp_path)
    assert 0 < done < 60
    assert evaluate(tmp_path).found == done
    assert without_timings(merged(tmp_path)) == undisturbed


# ------------------------------------------------------------------------------------------------------- disturbed


def test_killed_twenty_times_at_random_moments(tmp_path, undisturbed):
    rng = random.Random(20)
    folder, runs, kills, late = tmp_path / "run-0", 0, 0, 0
    while kills < 20 or late < 3:
        process = subprocess.Popen(command(folder, 0.01), stderr=subprocess.DEVNULL)
        more = rng.randint(0, 4)
        if more == 4:  # in the table and the picture at the end
            while not (folder / "results.jsonl").exists() and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.6))
            late += process.poll() is None
        elif more:
            wait_for(folder, lines(folder) + more, process)
            time.sleep(rng.uniform(0, 0.03))
        else:
            time.sleep(rng.uniform(0, 0.4))  # anywhere in the beginning
        process.kill()
        if process.wait() == -signal.SIGKILL:
            kills += 1
        else:  # it was done before: another one
            assert process.returncode == 0
            assert_whole(folder, undisturbed)
            runs += 1
            folder = tmp_path / f"run-{runs}"
    assert subprocess.run(command(folder), timeout=60).returncode == 0
    assert_whole(folder, undisturbed)


def assert_whole(folder: Path, undisturbed: list) -> None:
    assert without_timings(merged(folder)) == undisturbed
    results = (folder / "results.jsonl").read_text().split("\n")[:-1]
    assert without_timings([json.loads(line) for line in results]) == undisturbed
    assert "fake" in (folder / "table.md").read_text()
    assert (folder / "needles.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not list(folder.glob(".writing*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_batch_with_its_code(number, code, tmp_path, undisturbed):
    process = subprocess.Popen(command(tmp_path, 0.02), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path, 1, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and said.count("\n") == 1 and said.startswith("error: ")
    (part,) = parts(tmp_path)
    assert part.path.read_bytes().endswith(b"\n") and 0 < lines(tmp_path) < 60
    assert not (tmp_path / "results.jsonl").exists()
    evaluate(tmp_path)
    assert without_timings(merged(tmp_path)) == undisturbed


def test_a_signal_waits_for_the_batch_and_a_second_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with deferred_signals() as stop:
        stop()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Terminated):
            stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_share_the_samples(tmp_path, undisturbed):
    begun = [subprocess.Popen(command(tmp_path, 0.002, process, 3)) for process in range(3)]
    assert [process.wait(60) for process in begun] == [0, 0, 0]
    assert [part.process for part in parts(tmp_path)] == [0, 1, 2]
    alike = [{**record, "rows": 0} for record in without_timings(merged(tmp_path))]
    assert alike == [{**record, "rows": 0} for record in undisturbed]
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 60  # by whichever was the last


def test_the_last_share_completes_the_results(tmp_path):
    assert evaluate(tmp_path, process=1, processes=2).missing == 30
    assert not (tmp_path / "results.jsonl").exists()
    summary = evaluate(tmp_path)  # one process goes on with what two began
    assert (summary.found, summary.answered, summary.missing) == (30, 30, 0)
    assert len(merged(tmp_path)) == 60


# ------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, undisturbed, monkeypatch):
    room = 5000

    class Filling:
        """The module os for a disk with little room, which takes a part of the last line."""

        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, handle, data):
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = os.write(handle, bytes(data)[:room])
            room -= count
            return count

    with monkeypatch.context() as patch:
        patch.setattr(writers, "os", Filling())
        with pytest.raises(OSError, match=r"No space left on device: .*part-0-1\.jsonl") as caught:
            evaluate(tmp_path)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename.endswith("part-0-1.jsonl")
    assert not (tmp_path / "part-0-1.jsonl").read_bytes().endswith(b"\n")
    done, said = lines(tmp_path), []
    assert 5 < done < 60
    assert evaluate(tmp_path, report=said.append).found == done
    assert without_timings(merged(tmp_path)) == undisturbed and "was cut" in said[0]


def test_a_line_is_whole_and_synced_when_it_was_added(tmp_path, monkeypatch):
    did = []

    class Slow:
        """The module os, which writes three bytes at a time."""

        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, handle, data):
            did.append("write")
            return os.write(handle, bytes(data)[:3])

        def fsync(self, handle):
            did.append("sync")
            os.fsync(handle)

    for module in (writers, files):
        monkeypatch.setattr(module, "os", Slow())
    part = writers.LocalPart(writers.part_path(epath.Path(tmp_path), 0, 1))
    for added in (b"12345\n", b"6789\n"):
        part.add(added)
    part.close()
    assert did == ["sync", "write", "write", "sync", "write", "write", "sync"]  # the first is the folder's
    assert (tmp_path / "part-0-1.jsonl").read_bytes() == b"12345\n6789\n"


def test_a_file_that_the_system_lets_grow_no_further(tmp_path, undisturbed):
    """As on a full disk, but nothing has to be mounted: `ulimit -f`, in blocks of 1,024 bytes."""
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *command(tmp_path / "run")]
    said = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert said.returncode == 1 and said.stderr.count("\n") == 1
    assert "part-0-1.jsonl: File too large" in said.stderr
    done = lines(tmp_path / "run")
    summary = evaluate(tmp_path / "run")
    assert 5 < done == summary.found and summary.missing == 0
    assert without_timings(merged(tmp_path / "run")) == undisturbed


# ------------------------------------------------------------------------------------------------------- progress


def test_without_a_terminal_a_line_tells_every_30_seconds_what_is_left(tmp_path, monkeypatch):
    now = 0.0

    class Slow(FakeEngine):
        def answer(self, prompts):
            nonlocal now
            now += 11.0
            return super().answer(prompts)

    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    engine, said = Slow(), []
    evaluate(tmp_path, engine, report=said.append)
    assert len(said) == len(engine.batches) // 3
    total = sum(len(prompt.tokens) for batch in engine.batches for prompt in batch)
    first = sum(len(prompt.tokens) for batch in engine.batches[:3] for prompt in batch)
    left = progress.tqdm.format_interval(33.0 * (total - first) / first)
    assert said[0] == f"{first / total:.0%} of {total:,} tokens answered, {left} left"


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said = []
    evaluate(tmp_path, report=said.append)
    assert not said and "answers: 100%" in capsys.readouterr().err


def test_silence(tmp_path, capsys):
    evaluate(tmp_path)
    assert capsys.readouterr() == ("", "")
