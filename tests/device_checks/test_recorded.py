"""Recorded runs: what differs is told, and where they are not there it is no pass."""

from pathlib import Path

import pytest

from fastkv_jax.device_checks import recorded
from fastkv_jax.device_checks.results import Missing


def test_without_the_repository_the_recordings_are_missing(monkeypatch):
    monkeypatch.setattr(recorded, "FOLDER", Path("/nowhere"))
    with pytest.raises(Missing, match="no recordings at /nowhere: run this from the repository"):
        next(recorded.checks("cpu", True))


def test_entries_rows_tokens_and_logits_that_differ_are_told(monkeypatch):
    name = recorded.CASES[0]
    case, method = recorded._case(name)
    monkeypatch.setattr(recorded, "_case", lambda _: (case, method))
    assert recorded._as_recorded(name).status == "right"

    def told(key: str, change: int | float) -> str:
        with monkeypatch.context() as patch:
            patch.setitem(case, key, case[key] + change)
            outcome = recorded._as_recorded(name)
        assert outcome.status == "wrong"
        return outcome.found

    assert told("kept_pos_2", 1).endswith(", other entries kept")
    assert told("tsp_idx", 1).endswith(", other tokens went on")
    assert told("gen_tokens", 1).endswith(", other tokens made")
    assert told("prefill_logits", 0.001).startswith("1.0e-03 of 1.0e-04")


def test_kernels_that_choose_other_entries_than_plain_jax_numpy_are_found_out(monkeypatch):
    """Here both sides are plain jax.numpy; what stands for kernels reads other words."""
    name, real = recorded.CASES[0], recorded.prefill
    assert recorded._as_plain("cpu", name, None).status == "right"

    def other_words(model, tokens, start, **options):
        return real(model, tokens if "kernels" in options else tokens[:, ::-1] % 64, start, **options)

    monkeypatch.setattr(recorded, "prefill", other_words)
    outcome = recorded._as_plain("cpu", name, None)
    assert outcome.status == "wrong" and outcome.numbers["entries_common"] < 0.8
