"""lm-evaluation-harness's own command line, with the model `fastkv_jax` known to it."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from fastkv_jax.cli.flags import common


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to the harness."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval.__main__ import HarnessCLI, setup_logging
    except ImportError:
        print("error: lm-eval 0.4.13 or later is not installed; pip install fastkv-jax[lm-eval]", file=sys.stderr)
        return common.USAGE
    from fastkv_jax.cli.flags import compile_cache
    from fastkv_jax.evals import lm_eval_model  # noqa: F401 - registers it

    common.tell_warnings(quiet=False)
    compile_cache.use()
    sys.argv = ["lm_eval", *words]
    setup_logging()
    harness = HarnessCLI()
    options = harness.parse_args()
    try:
        _check(options)
        harness.execute(options)
    except tuple(common.EXIT_CODES) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return common.EXIT_CODES[type(error)]
    return common.OK


def _check(options: argparse.Namespace) -> None:
    """What can be told of a run of our model before the harness has loaded a task."""
    from lm_eval.utils import simple_parse_args_string

    from fastkv_jax.evals import gen_kwargs

    given = _run_settings(options)
    if given.get("model") != "fastkv_jax":
        return
    common.present_platform()
    asked = given.get("gen_kwargs") or {}
    gen_kwargs.check(simple_parse_args_string(asked) if isinstance(asked, str) else asked)


def _run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The flags over those of --config, as the harness has it."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    flags = {name: value for name, value in vars(options).items() if value}
    return {**EvaluatorConfig.load_yaml_config(flags["config"]), **flags} if "config" in flags else flags
