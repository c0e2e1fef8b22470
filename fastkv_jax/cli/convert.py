"""Convert any model into our own checkpoint, which loads sharded and in its final dtype."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastkv_jax.cli.flags import common


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(common.USAGE, f"error: {message}; see --help\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments; leaves with exit code 2 and one line on stderr if they are wrong."""
    parser = _Parser(prog="convert_checkpoint", description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="model folder, .gguf file, Hub id or known name")
    parser.add_argument("dest", metavar="DEST", help="folder to write; must be absent or empty")
    parser.add_argument("--tokenizer", metavar="SOURCE", help="bring a tokenizer along: any such source")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--check-weights", "--check_weights", action="store_true", help="refuse NaN and infinity")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion; returns the exit code."""
    options = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # there is nothing to compute, and a TPU serves one process only
    return common.run(convert, options)


def convert(options: argparse.Namespace) -> int:
    """Load the source and save it to the destination, with its tokenizer if it has one, or the one brought along."""
    from fastkv_jax.checkpoint import load_model, orbax, resolve

    orbax.check_target(options.dest)
    found = resolve(options.source, tokenizer=options.tokenizer, progress=not options.quiet)
    common.present_platform(quiet=options.quiet)
    extras = _tokenizer_writer(found)
    model = load_model(found, options.dtype, check_weights=options.check_weights, progress=not options.quiet)
    orbax.save(model, options.dest, extras)
    if not options.quiet:
        print(f"wrote {options.dest} ({options.dtype})", file=sys.stderr)
    return common.OK


def _tokenizer_writer(found: Any) -> Callable[[Any], None]:
    from fastkv_jax import text
    from fastkv_jax.checkpoint import orbax

    found = found.tokenizer or found
    if found.kind != "gguf":
        return orbax.copy_tokenizer_files(found.path)
    tokenizer = text.load_tokenizer(found)
    return lambda folder: _write_tokenizer(tokenizer, folder)


def _write_tokenizer(tokenizer: Any, folder: Any) -> None:
    """transformers writes to local folders only, so the files take a detour on their way to remote storage."""
    import tempfile

    from etils import epath

    from fastkv_jax.checkpoint import orbax

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        orbax.copy_tokenizer_files(epath.Path(Path(scratch)))(folder)
