"""Which models are timed where, and that memory is asked for first."""

import pytest

from fastkv_jax.device_checks import device, model_speed
from fastkv_jax.device_checks.results import DoesNotFit


def names(platform: str, quick: bool) -> list[str]:
    return [check.name for check in model_speed.checks(platform, quick)]


def test_an_accelerator_gets_the_paper_s_model_and_a_smaller_one_in_a_hurry():
    assert names("gpu", quick=False) == [
        "llama-3.1-8b, 32,768 tokens, full", "llama-3.1-8b, 32,768 tokens, fastkv",
        "llama-3.1-8b, 131,072 tokens, full", "llama-3.1-8b, 131,072 tokens, fastkv",
    ]  # fmt: skip
    assert names("tpu", quick=True) == ["llama-3.2-1b, 32,768 tokens, full", "llama-3.2-1b, 32,768 tokens, fastkv"]
    assert names("cpu", quick=True) == ["tiny, 256 tokens, full", "tiny, 256 tokens, fastkv"]


def test_a_model_that_does_not_fit_is_not_made(monkeypatch):
    """16 GB of weights, and 15 while they are drawn, or more for a full cache of 131,072 tokens and temporaries."""
    monkeypatch.setattr(model_speed, "_model", lambda *_: pytest.fail("a model was made"))
    monkeypatch.setattr(device, "memory", lambda: int(16e9))
    needs = []
    for check in model_speed.checks("gpu", False):
        with pytest.raises(DoesNotFit, match="needs .* GB of 16.0") as told:
            check.run()
        needs.append(float(str(told.value).split()[1]))
    assert needs == pytest.approx([31.1, 31.1, 39.3, 31.1], abs=1)
