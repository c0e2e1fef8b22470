"""--distributed: which share of the samples is this process's, and a start of all processes together.

Once they have met, processes that share samples have nothing to say to each other. So this does without
`jax.distributed`: there one process that dies takes the rest along, and one that waits in vain aborts.
"""

import argparse
import contextlib
import importlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from etils import epath

from fastkv_jax.errors import BackendError, FastKVConfigError

GREETING = "fastkv_jax evaluate"
JOIN_TIMEOUT = 300  # seconds
MET = ".met-"  # and how many: a folder's mark that so many processes have begun together
PAUSE = 1.0  # seconds between two attempts
LONGEST_LINE = 200


class Share(NamedTuple):
    """Process `process` of `processes`, which meet where the first one listens."""

    host: str
    port: int
    processes: int
    process: int
    devices: tuple[int, ...] = ()  # of this process, where several share a machine's GPUs; empty: all

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def add_flags(group: argparse._ArgumentGroup) -> None:
    """--distributed and --join-timeout."""
    group.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,N,I",
        help="share the samples with other processes: address of process 0, how many, which one (default: the cluster "
        "tells)",
    )
    group.add_argument(
        "--join-timeout",
        type=float,
        metavar="SECONDS",
        help=f"--distributed: wait so long for the others, > 0 (default: {JOIN_TIMEOUT})",
    )


def share(options: argparse.Namespace) -> Share | None:
    """This process's share, when the others are there; None without --distributed.

    Processes that have met once do not wait again: a share that was killed is asked for again alone.
    """
    import jax

    from fastkv_jax.cli.asking.report import Reporter

    if options.distributed is None:
        if options.join_timeout is not None:
            raise FastKVConfigError("--join-timeout belongs to --distributed")
        return None
    seconds = JOIN_TIMEOUT if options.join_timeout is None else options.join_timeout
    if not 0 < seconds < float("inf"):
        raise FastKVConfigError(f"--join-timeout must be > 0, got {seconds}")
    mine = detect(parse(options.distributed) if options.distributed else None, seconds)
    for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices") if mine.devices else ():
        jax.config.update(name, ",".join(map(str, mine.devices)))
    say = Reporter(quiet=options.quiet)
    meet(mine, seconds, lambda line: say.line("waiting", line), _mark(options, mine).exists)
    return mine


def remember(options: argparse.Namespace, mine: Share | None) -> None:
    """Leave the mark that all have begun, once the run's folder can be written to."""
    if mine is not None and mine.processes > 1 and not _mark(options, mine).exists():
        _mark(options, mine).write_bytes(b"")


def _mark(options: argparse.Namespace, mine: Share) -> epath.Path:
    return epath.Path(options.output) / f"{MET}{mine.processes}"


def parse(text: str) -> Share:
    """HOST:PORT,N,I as a share; raises `FastKVConfigError`."""
    address, *numbers = text.split(",")
    host, _, port = address.rpartition(":")
    if not host or len(numbers) != 2 or not all(number.isdecimal() for number in (port, *numbers)):
        raise FastKVConfigError(f"--distributed takes HOST:PORT,N,I, got {text!r}")
    processes, process = map(int, numbers)
    if not 1 <= int(port) <= 65535:
        raise FastKVConfigError(f"--distributed: a port is 1 ... 65535, got {port}")
    if process >= processes:
        raise FastKVConfigError(f"--distributed: process {process} of {processes}; they are counted from 0")
    return Share(host.removeprefix("[").removesuffix("]"), int(port), processes, process)


def detect(given: Share | None, seconds: float) -> Share:
    """What the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes) says where nothing was given, and this process's GPUs.

    Raises `BackendError` if there is no cluster.
    """
    known = (None, None, None) if given is None else (given.address, given.processes, given.process)
    try:
        # JAX's detection is part of jax.distributed.initialize() and has no door of its own.
        cluster = importlib.import_module("jax._src.clusters").ClusterEnv
        address, processes, process, devices = cluster.auto_detect_unset_distributed_params(
            *known, None, None, int(seconds)
        )
    except Exception as error:  # whatever a cluster's environment raises: HTTP, names, numbers
        if given is not None:
            return given
        raise BackendError(f"--distributed: cannot tell the other processes ({error}); give HOST:PORT,N,I") from error
    if None in (address, processes, process):
        raise BackendError("--distributed: this is no cluster that JAX knows; give HOST:PORT,N,I")
    return parse(f"{address},{processes},{process}")._replace(devices=tuple(devices or ()))


def meet(mine: Share, seconds: float, say: Callable[[str], object], met: Callable[[], bool] = lambda: False) -> None:
    """Wait until all processes are there; raises `BackendError` naming those that are not after `seconds`.

    `say` is told that this process waits. `met`, asked now and then: they were there before, there is no need to wait.
    """
    if mine.processes == 1 or met():
        return
    who = f"process {mine.process} of {mine.processes}"
    say(f"{who} waits at {mine.address} for the others, {seconds:g} s at most")
    end = time.monotonic() + seconds
    (_gather if mine.process == 0 else _report)(mine, end, seconds, met)


def _gather(mine: Share, end: float, seconds: float, met: Callable[[], bool]) -> None:
    """The first process: answer "go" when everyone has come."""
    with _listening(mine) as server, contextlib.ExitStack() as stack:
        there: dict[int, list[socket.socket]] = {}
        while missing := [i for i in range(1, mine.processes) if i not in there]:
            left = end - time.monotonic()
            if left <= 0:
                names = ", ".join(map(str, missing))
                raise BackendError(
                    f"after {seconds:g} s at {mine.address} there is no process {names} of {mine.processes}; "
                    "start all within --join-timeout"
                )
            server.settimeout(min(left, PAUSE))
            with contextlib.suppress(TimeoutError):
                other = stack.enter_context(server.accept()[0])
                if (number := _number(other, mine)) is not None:
                    there.setdefault(number, []).append(other)
                continue
            if met():
                return
        for other in (other for those in there.values() for other in those):
            with contextlib.suppress(OSError):  # it died while it waited: its share is asked for again another time
                other.sendall(b"go\n")


def _number(other: socket.socket, mine: Share) -> int | None:
    """Which process this is; None, and an answer, if it is none of ours."""
    with contextlib.suppress(OSError, ValueError):
        words = _line(other, 5.0).removeprefix(GREETING).split()
        number, processes = map(int, words)
        if processes == mine.processes and 0 < number < processes:
            return number
        other.sendall(f"no: process 0 is one of {mine.processes}\n".encode())
    return None


def _report(mine: Share, end: float, seconds: float, met: Callable[[], bool]) -> None:
    """Any other process: greet the first one until it answers."""
    last: Any = "nobody listens"
    while (left := end - time.monotonic()) > 0:
        if met():
            return
        try:
            with socket.create_connection((mine.host, mine.port), timeout=min(left, 10.0)) as first:
                first.sendall(f"{GREETING} {mine.process} {mine.processes}\n".encode())
                answer = _line(first, max(end - time.monotonic(), 0.001))
        except OSError as error:
            last = error.strerror or error
        else:
            if answer == "go":
                return
            if answer:
                raise BackendError(f"--distributed: {mine.address} answers {answer[:LONGEST_LINE]!r}")
            last = "process 0 went away"
        time.sleep(min(PAUSE, max(end - time.monotonic(), 0)))
    raise BackendError(
        f"after {seconds:g} s at {mine.address} there is no process 0 of {mine.processes}, or others that it waits for "
        f"are missing ({last}); start all within --join-timeout"
    )


def _line(connection: socket.socket, seconds: float) -> str:
    """The next line; what there is, if the other end closes."""
    connection.settimeout(seconds)
    read = b""
    while not read.endswith(b"\n") and len(read) < LONGEST_LINE:
        more = connection.recv(LONGEST_LINE)
        if not more:
            break
        read += more
    return read.decode(errors="replace").strip()


@contextmanager
def _listening(mine: Share) -> Iterator[socket.socket]:
    """On all interfaces: the name that others know this machine by may not be its own."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", mine.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BackendError(f"--distributed: process 0 cannot listen on port {mine.port}: {reason}") from error
    with server:
        yield server
