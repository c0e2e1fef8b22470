"""What every command shares: one-line errors, exit codes, the choice of the platform."""

import argparse
import contextlib
import difflib
import gc
import io
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn

from fastkv_jax.errors import BackendError, CheckpointError, FastKVConfigError, InputError, Terminated

OK, FAILED, USAGE, BAD_MODEL, DEVICE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143
EXIT_CODES = {FastKVConfigError: USAGE, InputError: USAGE, CheckpointError: BAD_MODEL, BackendError: DEVICE}
DEFAULT_MODEL = "smollm2-135m"
NAMES = {"cpu": ("cpu",), "gpu": ("cuda", "gpu", "rocm"), "tpu": ("tpu",)}  # JAX's, the first by default


class Parser(argparse.ArgumentParser):
    """Flags in both spellings, --like-this and --like_this; every complaint is one line that starts with `error:`."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(USAGE)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags, or an error that proposes the flag that was meant."""
        words = [_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
        options, unknown = self.parse_known_args(words)
        if unknown == ["-"] and "dash" in options:
            options.dash = True
        elif unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.75)
            self.error(
                f"unknown argument {unknown[0]!r}" + (f"; did you mean {close[0]}?" if close else "; see --help")
            )
        return options


def _hyphens(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else word


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--model and --dtype; returns their group, for flags that belong beside them."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"folder, .gguf file, Hub id or known name (default: {DEFAULT_MODEL})"
    )
    group.add_argument(
        "--tokenizer", metavar="SOURCE", help="bring a tokenizer along: a folder or any source that --model takes "
        "(default: the model's own)"
    )  # fmt: skip
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float32 on the CPU, else bfloat16",
    )
    return group


def add_template_flags(group: argparse._ArgumentGroup) -> None:
    """What the chat template is told."""
    group.add_argument(
        "--chat-template-args", metavar="JSON", help="""arguments of the chat template: '{"enable_thinking": false}'"""
    )
    group.add_argument("--date", metavar="YYYY-MM-DD", help="the day, or moment, that it is told (default: now)")


def rendering(options: argparse.Namespace, date: str | None = None) -> Any:
    """A `Rendering` from the flags, at one moment for the whole run; `date` is the one to use if no flag names one."""
    from fastkv_jax.chat_template import Rendering, parse_arguments, parse_date

    given = options.date or date
    moment = datetime.now() if given is None else parse_date(given)
    return Rendering(moment, parse_arguments(options.chat_template_args or "{}"))


def dtype_for(options: argparse.Namespace, platform: str) -> str:
    """The dtype asked for; auto is float32 on the CPU, else bfloat16."""
    return ("float32" if platform == "cpu" else "bfloat16") if options.dtype == "auto" else options.dtype


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that runs a model."""
    group = add_device_flags(parser)
    group.add_argument(
        "--no-compile-cache", action="store_true", help="neither read nor keep compiled programs (docs/tpu_vm.md)"
    )
    group.add_argument("-v", "--verbose", action="store_true", help="log every compilation")


def add_device_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where to run, and what to say of it; returns their group."""
    group = parser.add_argument_group("device and reports")
    group.add_argument(
        "--platform",
        choices=("auto", *NAMES),
        default="auto",
        help="never a silent fall back to CPU (default: auto)",
    )
    group.add_argument(
        "--mem-fraction",
        type=float,
        metavar="F",
        help="share of GPU memory JAX may take, in (0, 1] (JAX's default: 0.75)",
    )
    group.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    group.add_argument("--debug", action="store_true", help="show tracebacks")
    return group


def choose_platform(options: argparse.Namespace) -> str:
    """Set JAX up for the platform asked for; returns the one in use, cpu, gpu or tpu, or raises `BackendError`."""
    wanted, present = options.platform, os.environ.get("JAX_PLATFORMS", "")
    platforms = _platforms(wanted, present)
    if options.mem_fraction is not None:
        if not 0 < options.mem_fraction <= 1:
            raise FastKVConfigError(f"--mem-fraction must be in (0, 1], got {options.mem_fraction}")
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(options.mem_fraction)
    if platforms:
        os.environ["JAX_PLATFORMS"] = platforms
    import jax

    if platforms:
        jax.config.update("jax_platforms", platforms)  # jax may have been imported before us
    if options.verbose:
        jax.config.update("jax_log_compiles", True)
    found = present_platform(wanted, quiet=options.quiet)
    if wanted not in ("auto", found):
        raise BackendError(f"--platform {wanted}, but JAX found only {found}")
    return found


def present_platform(wanted: str = "auto", *, quiet: bool = False) -> str:
    """The one that JAX finds: cpu, gpu or tpu; raises `BackendError` if there is none of those it was told to use."""
    import jax

    try:
        with _silent() if quiet else contextlib.nullcontext():
            name = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as error:  # what JAX raises depends on the plugin that is missing
        raise BackendError(_no_device(wanted, os.environ.get("JAX_PLATFORMS", ""), error)) from error
    return "gpu" if name in NAMES["gpu"] else name


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stderr, not from C++ either: libtpu, where it is installed without a TPU, heeds no log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _platforms(wanted: str, present: str) -> str:
    """What JAX_PLATFORMS, a list, is to be for the platform asked for; raises `BackendError` if it is not in it."""
    given = [name for part in present.split(",") if (name := part.strip())]
    if wanted == "auto":
        return ",".join(given)
    fitting = [name for name in given if name.lower() in NAMES[wanted]]
    if given and not fitting:
        raise BackendError(f"--platform {wanted} contradicts JAX_PLATFORMS={present} in the environment; drop one")
    return "rocm" if fitting[:1] == ["rocm"] else NAMES[wanted][0]


def _no_device(wanted: str, present: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    if wanted == "gpu" or (wanted == "auto" and present in ("cuda", "gpu")):
        return f"no CUDA device visible to JAX (nvidia-smi: found {_gpus()}). Install fastkv-jax[cuda13]"
    if wanted == "tpu" or (wanted == "auto" and present == "tpu"):
        why = reason or "no reason given"
        return f"no TPU visible to JAX ({why}). Install fastkv-jax[tpu] on a TPU VM, one process per TPU"
    return f"JAX found no device for JAX_PLATFORMS={present!r}: {reason or type(error).__name__}"


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def use_compile_cache(options: argparse.Namespace) -> None:
    """Keep compiled programs between runs, or, with --no-compile-cache, neither read nor write any."""
    import jax

    from fastkv_jax.cli.flags import compile_cache

    if options.no_compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        compile_cache.use()


def silence_xla() -> None:
    """No lines of XLA's C++ on stderr, unless they end the process; to be called before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def run(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; turn what it raises into one line on stderr and an exit code."""
    gc.set_threshold(50_000, 50, 50)  # imports and tracing make many objects and no garbage: a tenth of their time
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to fail
    options.warnings = tell_warnings(quiet=options.quiet)
    if options.quiet:
        silence_xla()
    try:
        return command(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return OK
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, options)
    except Terminated:
        return _fail("terminated", TERMINATED, options)
    except tuple(EXIT_CODES) as error:
        return _fail(error, EXIT_CODES[type(error)], options)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", FAILED, options)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            first = str(error).strip().splitlines()[0]
            return _fail(
                f"out of device memory: {first}. Use a shorter prompt, --dtype bfloat16, or a method that keeps less",
                DEVICE,
                options,
            )
        if options.debug:
            raise
        return _fail(f"{type(error).__name__}: {error} (this is a bug; --debug shows where)", FAILED, options)


def leave(code: int) -> NoReturn:
    """End the process with this code.

    After a signal at once: threads of XLA may still compute, and what Python takes apart under them can crash.
    """
    if code in (INTERRUPTED, TERMINATED):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(error: object, code: int, options: argparse.Namespace) -> int:
    if options.debug and isinstance(error, Exception):
        traceback.print_exception(error)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


def tell_warnings(*, quiet: bool) -> list[str]:
    """From now on each warning is one line on stderr, once, unless `quiet`; returns the list that collects them."""
    told: list[str] = []

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        if line not in told:
            told.append(line)
            if not quiet:
                print(f"warning: {line}", file=sys.stderr, flush=True)

    warnings.showwarning = show
    return told
