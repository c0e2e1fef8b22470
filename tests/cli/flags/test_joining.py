"""--distributed: processes that share samples begin together, or say in one line who is missing."""

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from fastkv_jax.cli.flags import joining
from fastkv_jax.cli.flags.joining import Share, meet
from fastkv_jax.errors import BackendError, FastKVConfigError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(joining, "PAUSE", 0.02)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def start():
    """Let a process of a group wait in a thread; its future holds what it said."""
    with ThreadPoolExecutor(8) as pool:

        def begin(share: Share, seconds: float = 30.0, **options) -> Future:
            said: list[str] = []
            return pool.submit(lambda: meet(share, seconds, said.append, **options) or said)

        yield begin


def test_a_share_as_it_is_written():
    assert joining.parse("host.name:9911,4,2") == Share("host.name", 9911, 4, 2)
    assert joining.parse("[::1]:9911,1,0") == Share("::1", 9911, 1, 0)
    assert joining.parse("[::1]:9911,1,0").address == "[::1]:9911"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("here", "takes HOST:PORT,N,I, got 'here'"),
        (":9911,2,0", "takes HOST:PORT,N,I"),
        ("here:9911", "takes HOST:PORT,N,I"),
        ("here:9911,2,-1", "takes HOST:PORT,N,I"),
        ("here:9911,2,0,1", "takes HOST:PORT,N,I"),
        ("here:port,2,0", "takes HOST:PORT,N,I"),
        ("here:0,2,0", "a port is 1 ... 65535, got 0"),
        ("here:65536,2,0", "a port is 1 ... 65535, got 65536"),
        ("here:9911,2,2", "process 2 of 2; they are counted from 0"),
        ("here:9911,0,0", "process 0 of 0; they are counted from 0"),
    ],
)
def test_a_share_that_cannot_be(text, message):
    with pytest.raises(FastKVConfigError, match=message):
        joining.parse(text)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_begin_when_the_last_is_there(late, port, start):
    waiting = [start(Share("localhost", port, 3, i)) for i in range(3) if i != late]
    time.sleep(0.1)
    assert not any(other.done() for other in waiting)
    last = start(Share("localhost", port, 3, late))
    for other in [*waiting, last]:
        (said,) = other.result(30)
        assert said.endswith(f" of 3 waits at localhost:{port} for the others, 30 s at most")


def test_one_alone_has_nobody_to_wait_for(start):
    assert start(Share("nowhere.invalid", 1, 1, 0)).result(5) == []


def test_who_is_missing_is_named(port, start):
    first, third = start(Share("localhost", port, 4, 0), 1.0), start(Share("localhost", port, 4, 2), 1.5)
    with pytest.raises(BackendError, match=rf"after 1 s at localhost:{port} there is no process 1, 3 of 4; start all"):
        first.result(30)
    with pytest.raises(BackendError, match=rf"after 1.5 s at localhost:{port} there is no process 0 of 4, or others"):
        third.result(30)


def test_a_host_that_is_not_there_is_named(start):
    with pytest.raises(BackendError, match=r"at nowhere\.invalid:9 there is no process 0 of 2"):
        start(Share("nowhere.invalid", 9, 2, 1), 0.2).result(30)


def test_a_group_of_another_size_is_told(port, start):
    first = start(Share("localhost", port, 2, 0))
    with pytest.raises(BackendError, match="answers 'no: process 0 is one of 2'"):
        start(Share("localhost", port, 3, 1)).result(30)
    start(Share("localhost", port, 2, 1)).result(30)
    first.result(30)


def test_strangers_are_nobody(port, start):
    first = start(Share("localhost", port, 2, 0))
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\n",
        b"",
        b"fastkv_jax evaluate 7 2\n",
        b"fastkv_jax evaluate 0 2\n",
    ):
        while True:
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionRefusedError:  # not listening yet
                time.sleep(0.01)
    assert not first.done()
    start(Share("localhost", port, 2, 1)).result(30)
    first.result(30)


def test_a_first_process_that_died_is_waited_for_again(port, start):
    with socket.create_server(("localhost", port)) as dying:
        second = start(Share("localhost", port, 2, 1))
        dying.accept()[0].close()
    assert not second.done()
    start(Share("localhost", port, 2, 0)).result(30)
    second.result(30)


def test_a_port_that_is_taken_is_one_line(port, start):
    with socket.create_server(("", port)):
        with pytest.raises(BackendError, match=f"process 0 cannot listen on port {port}: Address already in use"):
            start(Share("localhost", port, 2, 0)).result(30)


@pytest.mark.parametrize("process", [0, 1])
def test_who_has_met_before_does_not_wait(process, port, start):
    mark = threading.Event()
    assert start(Share("localhost", port, 2, process), met=lambda: True).result(5) == []
    waiting = start(Share("localhost", port, 2, process), met=mark.is_set)
    time.sleep(0.1)
    assert not waiting.done()
    mark.set()  # others, which had begun, leave it while this one waits already
    assert len(waiting.result(5)) == 1


def test_slurm_tells_who_the_others_are_and_which_device_is_mine(monkeypatch):
    for name, value in {"JOB_ID": "4096", "STEP_NODELIST": "node[003-007]", "NTASKS": "8", "PROCID": "5",
                        "LOCALID": "1"}.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert joining.detect(None, 10) == Share("node003", 61440, 8, 5, (1,))
    assert joining.detect(Share("mine", 9, 2, 0), 10) == Share("mine", 9, 2, 0, (1,))


def test_without_a_cluster_the_address_must_be_given(monkeypatch):
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    with pytest.raises(BackendError, match="this is no cluster that JAX knows; give HOST:PORT,N,I"):
        joining.detect(None, 1)
    assert joining.detect(Share("mine", 9, 2, 0), 1) == Share("mine", 9, 2, 0)
