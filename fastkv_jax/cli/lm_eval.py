"""lm-evaluation-harness's own command line, with the model `fastkv_jax` known to it."""

import sys
from collections.abc import Sequence

from fastkv_jax.cli.common import tell_warnings


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to the harness."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        print("error: the harness is not installed; pip install fastkv-jax[lm-eval]", file=sys.stderr)
        return 2
    from fastkv_jax.cli import compile_cache
    from fastkv_jax.errors import BackendError, CheckpointError, FastKVConfigError, InputError
    from fastkv_jax.evals import lm_eval_model  # noqa: F401 - registers it

    tell_warnings(quiet=False)
    compile_cache.use()
    sys.argv = ["lm_eval", *words]
    try:
        cli_evaluate()
    except (BackendError, CheckpointError, FastKVConfigError, InputError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
