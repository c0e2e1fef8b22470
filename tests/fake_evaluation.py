"""An evaluation without a model: an engine whose answers follow from the prompts, and a command that tests can kill.

python fake_evaluation.py FOLDER SECONDS [PROCESS PROCESSES]
"""

import argparse
import hashlib
import random
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if (
    __name__ == "__main__"
):  # without fastkv_jax/__init__.py, which imports JAX: the runner needs none and starts at once
    package = types.ModuleType("fastkv_jax")
    package.__path__ = [str(Path(__file__).parents[1] / "fastkv_jax")]
    sys.modules["fastkv_jax"] = package

from fastkv_jax.evals.records.folder import opened
from fastkv_jax.evals.running.runner import Summary, run
from fastkv_jax.evals.sample import Encoded, Sample
from fastkv_jax.evals.suites.scorers import Scored

CONFIG = {"method": "fake", "protocol": "test", "budgets": (1, 2)}
TIMINGS = ("ttft_s",)


def samples(count: int = 60) -> list[Sample]:
    """Of two tasks, 1 to 700 tokens long."""
    rng = random.Random(0)
    return [
        Sample(
            ("needle", "words")[i % 3 % 2],
            str(i),
            "".join(rng.choices("abcdefé ", k=rng.randint(1, 350))),
            f"{i}?",
            ("a",),
            max_new_tokens=(8, 16)[i % 2],
            group=f"{i % 4}K",
        )
        for i in range(count)
    ]


class FakeEngine:
    """Tokens are bytes. `fails` says which batches are too large."""

    def __init__(self, seconds: float = 0.0, fails: Callable[[Sequence[Encoded]], bool] = lambda batch: False):
        self.seconds, self.fails = seconds, fails
        self.batches: list[list[Encoded]] = []

    def encode(self, sample: Sample) -> Encoded:
        whole = list((sample.context + sample.question).encode())
        return Encoded(sample, whole[-650:], 2, len(whole))

    def answer(self, prompts: Sequence[Encoded]) -> list[dict[str, Any]]:
        self.batches.append(list(prompts))
        if self.fails(prompts):
            raise MemoryError("no room")
        began = time.perf_counter()
        time.sleep(self.seconds * len(prompts))
        return [
            {
                "prediction": hashlib.sha256(bytes(prompt.tokens)).hexdigest() + " é\u2028\n",
                "finish": "stop",
                "rows": len(prompts),
                "ttft_s": time.perf_counter() - began,
            }
            for prompt in prompts
        ]


def score(sample: Sample, answer: Mapping[str, Any]) -> Scored:
    """Of nothing in particular."""
    return Scored(answer["prediction"].count("a") / 64, "odd" if sample.id == "7" else "")


def evaluate(
    folder: Any, engine: Any = None, asked: Sequence[Sample] | None = None, *, config: Any = CONFIG, **options: Any
) -> Summary:
    """One process's whole part in an evaluation."""
    opening = {
        name: options.pop(name) for name in ("process", "processes", "overwrite", "take_over") if name in options
    }
    given = {"score": score, "batch_tokens": 1024, "max_rows": 4, **options}
    with opened(folder, config, **opening) as output:
        return run(samples() if asked is None else asked, engine or FakeEngine(), output, **given)


def without_timings(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a resumed run must have in common with an undisturbed one."""
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def report(folder: Path) -> None:
    """A table and a picture of what was answered, as the command writes them at its end."""
    from fastkv_jax.evals.records.folder import write_whole
    from fastkv_jax.evals.records.records import merged
    from fastkv_jax.evals.reports import heat_map, tables

    records = merged(folder)
    table = tables.as_markdown(tables.rows_of([tables.Run("fake", records)], lambda _: {}))
    write_whole(folder / "table.md", table.encode())
    heat_map.heat_map(
        [{"group": f"{1024 + len(r['id'])}/50", "score": r["score"]} for r in records], folder / "needles.png"
    )


def _command(options: argparse.Namespace) -> int:
    from fastkv_jax.evals.running.signals import deferred_signals

    with deferred_signals() as stop:
        evaluate(
            options.folder, FakeEngine(options.seconds), process=options.process, processes=options.processes, stop=stop
        )
        if options.processes == 1:
            report(Path(options.folder))
    return 0


if __name__ == "__main__":
    from fastkv_jax.cli.flags import common

    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("seconds", type=float)
    parser.add_argument("process", type=int, nargs="?", default=0)
    parser.add_argument("processes", type=int, nargs="?", default=1)
    parser.set_defaults(quiet=False, debug=False)
    status = common.run(_command, parser.parse_args())
    assert "jax" not in sys.modules
    sys.exit(status)
