"""transformers is timed alone, after ours, from a folder that ours leaves behind. PyTorch itself is not needed here."""

import contextlib
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples import MODEL_A, model_a
from fastkv_jax.benchmarks import against_transformers, torch_peer
from fastkv_jax.cli import benchmark
from fastkv_jax.errors import FastKVConfigError

PEER = """
import json, sys, numpy as np
from pathlib import Path

folder = Path(sys.argv[1])
job, ours = json.loads((folder / "job.json").read_text()), dict(np.load(folder / "ours.npz"))  # ours have ended
prompts = dict(np.load(folder / "prompts.npz"))
assert [prompts[str(n)].shape for n in job["tokens"]] == [(2, n) for n in job["tokens"]]
np.savez(folder / "theirs.npz", **{n: a + np.float32(0.25) for n, a in ours.items()})
run = {"prefill": 2.0, "decode": 0.5, "whole": 4.0}
rows = [{"tokens": n, "runs": [run, run], **FAILED} for n in job["tokens"]]
print(json.dumps(rows))
"""
WORDS = ["--platform", "cpu", "--no-compile-cache", "--repeats", "1", "--batch", "2", "--new-tokens", "16"]
WORDS += ["--no-rates", "--method", "full", "--tokens", "64", "40", "--peer", "transformers"]


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """Another in the place of transformers; returns what makes it fail at every length, or not."""

    def make(failed: dict[str, str]) -> None:
        script = tmp_path / "peer.py"
        script.write_text(PEER.replace("FAILED", repr(failed)))
        monkeypatch.setattr(against_transformers, "PEER", (sys.executable, str(script)))

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "torch" or found(name, *a))
    return make


def test_it_runs_after_ours_have_ended(peer, tiny_model, capsys):
    peer({})
    assert benchmark.main([*WORDS, "--model", str(tiny_model), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(row["tokens"], row["name"]) for row in found["rows"]]
    assert rows == [(64, "full"), (64, "transformers"), (40, "full"), (40, "transformers")]
    full, theirs = found["rows"][:2]
    for part, seconds in (("prefill", 2.0), ("decode", 0.5), ("whole", 4.0)):
        assert theirs[f"{part}_s"] == seconds and theirs[f"{part}_range_s"] == [seconds, seconds]
        assert theirs[f"{part}_speedup"] == pytest.approx(full[f"{part}_s"] / seconds)
    assert "not in turns" in found["peer"]


def test_a_length_that_it_cannot_do_does_not_cost_the_others(peer, tiny_model, capsys):
    peer({"error": "CUDA out of memory"})
    assert benchmark.main([*WORDS, "--model", str(tiny_model)]) == 4
    out, err = capsys.readouterr()
    assert "| 40 | full |" in out and "| transformers |" not in out
    assert err.splitlines()[-1] == "error: --peer transformers, 64 tokens: CUDA out of memory"
    assert "last-token logits differ by at most 2.5e-01" in err


def test_weights_and_task_are_handed_over(tmp_path):
    prompts = {3: np.array([[1, 2, 3]], np.int32)}
    against_transformers.hand_over(tmp_path, model_a(), prompts, weights=True, new_tokens=16, repeats=2, quiet=True)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["dtype"] == "float32" and job["device"] == "cpu" and job["tokens"] == [3] and job["skipped"] == 8
    handed = {name: array for file in tmp_path.glob("*.safetensors") for name, array in load_file(file).items()}
    own = load_file(MODEL_A / "model.safetensors")
    assert set(handed) == set(own)
    for name, array in own.items():
        np.testing.assert_array_equal(handed[name], np.asarray(array, np.float32), err_msg=name)


def test_it_is_built_in_its_own_dtype_where_it_runs(monkeypatch, tmp_path):
    """Made in float32 first it would need twice the memory, and on the host it would have to move."""
    now = {"dtype": "float32", "device": "cpu"}

    @contextlib.contextmanager
    def device(name):
        now["device"] = name
        yield
        now["device"] = "cpu"

    class Theirs:
        def __init__(self, config):
            self.made = dict(now)

        eval = lambda self: self  # noqa: E731
        named_parameters = lambda self: ()  # noqa: E731

    torch = SimpleNamespace(bfloat16="bfloat16", set_default_dtype=lambda dtype: now.update(dtype=dtype), device=device,
                            no_grad=contextlib.nullcontext)  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", torch)
    theirs = SimpleNamespace(LlamaConfig=lambda **given: SimpleNamespace(**given), LlamaForCausalLM=Theirs)
    monkeypatch.setitem(sys.modules, "transformers", theirs)
    built = torch_peer.build({"config": {}, "dtype": "bfloat16", "device": "cuda"}, tmp_path)
    assert built.made == {"dtype": "bfloat16", "device": "cuda"}


def test_without_pytorch_it_says_so_at_once(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(FastKVConfigError, match="pip install torch"):
        against_transformers.check_torch()
    assert benchmark.main([*WORDS, "--model", str(MODEL_A)]) == 2
    assert capsys.readouterr().err == "error: --peer transformers needs PyTorch: pip install torch\n"


def test_random_weights_are_its_own(tmp_path):
    prompts = {3: np.array([[1, 2, 3]], np.int32)}
    against_transformers.hand_over(tmp_path, model_a(), prompts, weights=False, new_tokens=16, repeats=2, quiet=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["job.json", "prompts.npz"]
    assert against_transformers.apart(tmp_path) is None
