"""One name for all commands: fastkv-jax generate, evaluate, convert, benchmark, calibrate, check_device, lm_eval."""

import importlib
import sys
from collections.abc import Sequence

from fastkv_jax.cli.flags.common import leave

COMMANDS = {
    "generate": "answer prompts",
    "evaluate": "ask a suite's questions: RULER, LongBench, needles, perplexity",
    "convert": "write a model as this project's own checkpoint",
    "benchmark": "time prefill and decode against full context",
    "calibrate": "choose the TSP layer, window and kernel for a model",
    "check_device": "is my accelerator right, and how fast is it?",
    "lm_eval": "lm-evaluation-harness with a model of ours",
}


def console() -> None:
    """The installed command."""
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to the command named first; it imports only what it needs."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return importlib.import_module(f"fastkv_jax.cli.{words[0]}").main(words[1:])
    listed = "\n".join(f"  {name:<12} {what}" for name, what in COMMANDS.items())
    if words[:1] in ([], ["-h"], ["--help"]):
        print(f"usage: fastkv-jax COMMAND [flags]; COMMAND --help lists them\n\n{listed}")
        return 0 if words else 2
    print(f"error: unknown command {words[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
