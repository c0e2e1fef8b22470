"""What people and machines see: progress and statistics on stderr, the answer or its JSON on stdout."""

import contextlib
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import jax
from tqdm import tqdm

import fastkv_jax
from fastkv_jax.buckets import bucket_for
from fastkv_jax.cli.asking.answering import LONG_PROMPT, Answer, Encoded
from fastkv_jax.costs import cache_bytes, weight_count
from fastkv_jax.methods import FullKV, Method
from fastkv_jax.methods.plan import Kept, effective_budgets
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.platforms import cudnn_attends

MOST_RUNS = 4  # runs of layers named in one line


class AnswerWriter:
    """Writes the answer as it comes, every `interval` pieces."""

    def __init__(self, out: TextIO, interval: int, *, strip_controls: bool):
        self._out, self._interval, self._strip = out, interval, strip_controls
        self._pieces: list[str] = []

    def write(self, piece: str) -> None:
        """Print a piece, or keep it until there are enough."""
        self._pieces.append(piece)
        if len(self._pieces) >= self._interval:
            self._flush()

    def finish(self) -> None:
        """Print what is left and end the line."""
        self._pieces.append("\n")
        self._flush()

    def _flush(self) -> None:
        text = "".join(self._pieces)
        if self._strip:  # a model's text may hold terminal commands
            text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
        self._out.write(text)
        self._out.flush()
        self._pieces.clear()


class Reporter:
    """The lines on stderr; none of them if `quiet`."""

    def __init__(self, *, quiet: bool):
        self._quiet = quiet
        self.interactive = not quiet and sys.stderr.isatty()

    def line(self, label: str, text: str) -> None:
        """One labelled line."""
        if not self._quiet:
            print(f"{label:<9}{text}", file=sys.stderr, flush=True)

    def header(self, platform: str, dtype: str) -> None:
        """Versions and device."""
        devices = jax.local_devices()
        kind = devices[0].device_kind
        device = f"{platform} ×{len(devices)}" if kind.lower() == platform else f"{platform}: {kind} ×{len(devices)}"
        if not self._quiet:
            versions = f"fastkv_jax {fastkv_jax.__version__} · jax {jax.__version__}"
            print(f"{versions} · {device} · {dtype}", file=sys.stderr, flush=True)

    def attention(self, platform: str, dtype: str, head_dim: int) -> None:
        """Said where a GPU reads prompts without cuDNN: what is right is no warning, but slow."""
        if platform == "gpu" and not cudnn_attends(dtype, head_dim):
            self.line("slow", f"cuDNN's attention takes bfloat16 and float16 at head sizes 8, 16 ... 128; prompts of "
                      f"{dtype} at {head_dim} are read by plain jax.numpy")  # fmt: skip

    def job(self, identity: Any, job: Encoded | Exception, side: str | None) -> None:
        """What happened to a prompt on its way to tokens, if anything did."""
        if isinstance(job, Exception):
            self.line("skipped", f"id {identity!r}: {job}")
        elif job.cut:
            self.line("cut", f"{len(job.token_ids) + job.cut:,} tokens to {len(job.token_ids):,} (--truncate {side})")

    @contextlib.contextmanager
    def timed(self, label: str, text: str) -> Iterator[Callable[[str], None]]:
        """A line with the seconds the block took; the block may add a note."""
        notes: list[str] = []
        began = time.perf_counter()
        yield notes.append
        self.line(label, "  ".join([text, *notes, f"{time.perf_counter() - began:.1f} s"]))

    def compiled(self, program: str, seconds: float) -> None:
        """Said once per program, if it took noticeable time."""
        if seconds >= 0.1:
            self.line("compile", f"{program}  {seconds:.1f} s")

    @contextlib.contextmanager
    def progress(self, layers: int, job: Encoded) -> Iterator[Callable[[int], object] | None]:
        """A bar over the layers of a long prefill, None where there is nobody to watch it."""
        if not self.interactive or bucket_for(len(job.token_ids)) < LONG_PROMPT:
            yield None
            return
        with tqdm(total=layers, desc="prefill", unit="layer", file=sys.stderr, leave=False) as bar:
            yield bar.update

    @contextlib.contextmanager
    def rows(self, count: int) -> Iterator[Callable[[], object]]:
        """A bar over the prompts of a batch."""
        with tqdm(total=count, desc="prompts", file=sys.stderr, disable=not self.interactive) as bar:
            yield bar.update

    def stats(self, answer: Answer, method: Method, name: str) -> None:
        """Speed, budgets and memory of one answer. Compilation is never inside tok/s."""
        new = len(answer.token_ids)
        self.line(
            "prompt",
            f"{answer.prompt_tokens:,} tok in {answer.prefill_s:.2f} s  "
            f"{answer.prompt_tokens / max(answer.prefill_s, 1e-9):,.0f} tok/s  (bucket {answer.bucket:,})",
        )
        self.line(
            "decode",
            f"{new:,} tok in {answer.decode_s:.2f} s  "
            f"{new / max(answer.decode_s, 1e-9):,.1f} tok/s  stop: {answer.finish_reason}",
        )
        self.line("kv", describe_budgets(answer.kept, answer.prompt_tokens, method, name))
        if (peak := peak_memory()) is not None:
            self.line("memory", f"peak {peak / 2**30:.1f} GiB")

    def plan(self, config: LlamaConfig, method: Method, jobs: Sequence[Encoded], dtype: str, new: int) -> None:
        """What a run would do and hold, for --dry-run; printed to stdout."""
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
        print(f"weights  {weight_count(config) * size / 2**30:.2f} GiB ({dtype})")
        for job in jobs:
            n, bucket = len(job.token_ids), bucket_for(len(job.token_ids))
            budgets = effective_budgets(method, n, job.window_end, config.num_layers)
            print(f"prompt   {n:,} tok (bucket {bucket:,}), {job.window_end} after the window")
            print(f"kv       {describe_budgets(budgets, n, method, 'this method')}")
            print(f"cache    {cache_bytes(config, method, bucket, new, size) / 2**30:.3f} GiB")


def describe_budgets(kept: Sequence[Kept], n: int, method: Method, name: str) -> str:
    """Effective budgets as counts and per cent.

    layers 0–14: 600 kept of 3,000 (20 %)   layers 15–29: 600 of 600 after TSP at layer 14
    """
    floor = getattr(method, "min_prompt_to_compress", 0)
    if all(run.kept == n for run in kept):
        reason = "method full" if isinstance(method, FullKV) else "no compression: prompt ≤ budget"
        if n < floor:
            reason = f"no compression: prompt < {floor:,}, min_prompt_to_compress"
        return f"kept {n:,}/{n:,} ({reason})"
    runs = []
    for run in kept:
        layers = f"layers {run.first}–{run.last}: {run.kept:,}"
        if run.tokens == n:
            runs.append(f"{layers} kept of {n:,} ({run.kept / n:.0%})".replace("%", " %"))
        elif run.first == 0:
            runs.append(f"{layers} of the {run.tokens:,} read again")
        else:
            runs.append(f"{layers} of {run.tokens:,} after TSP at layer {run.first - 1}")
    return "   ".join(runs if len(runs) <= MOST_RUNS else [*runs[: MOST_RUNS - 1], "…", runs[-1]])


def as_json(answer: Answer, effective: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """Everything about one answer, and what was doubtful on the way to it."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": len(answer.token_ids),
        "bucket": answer.bucket,
        "timings": answer.timings(),
        "kv": [dict(zip(("first_layer", "last_layer", "tokens", "kept"), run, strict=True)) for run in answer.kept],
        "settings": effective,
        "warnings": list(warnings),
        "versions": {"fastkv_jax": fastkv_jax.__version__, "jax": jax.__version__},
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int | None:
    """Peak bytes in use on the first device, None where the platform does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
