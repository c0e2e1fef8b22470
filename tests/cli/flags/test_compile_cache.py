"""Compiled programs kept between runs: where the user says, within bounds, and a damaged one is compiled again."""

import os
import random
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastkv_jax.cli.flags import common, compile_cache
from fastkv_jax.cli.flags.compile_cache import Programs
from fastkv_jax.errors import BackendError

ROOT = Path(__file__).parents[3]
COMMAND = """
import argparse, sys
from fastkv_jax.cli.flags import common

def command(options):
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    import jax
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    @jax.jit
    def program(x):
        for i in range(20):
            x = jax.numpy.sin(x) @ jax.numpy.cos(x.T + i)
        return x.sum() * 0 + 42
    print(platform, int(program(jax.numpy.ones((8, 8)))), int("/jax/compilation_cache/cache_hits" in hits))
    return 0

parser = common.Parser()
common.add_run_flags(parser)
sys.exit(common.run(command, parser.parse(sys.argv[1:])))
"""


def run(*words: str, home: Path, **variables: str) -> tuple[str, str]:
    """What a command prints on stdout (platform, result, whether a program was found again) and on stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TF_CPP_"))}
    kept |= {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--platform", "cpu", *words],
        env=kept | variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# ------------------------------------------------------------------------------------------------- through JAX


def test_a_program_is_kept_in_a_folder_of_this_user_alone_and_found_again(tmp_path):
    own = tmp_path / "fastkv_jax" / "compiled"
    assert run(home=tmp_path) == ("cpu 42 0", "")
    assert own.stat().st_mode & 0o777 == 0o700
    assert {name.rsplit("-", 1)[1] for name in names(own)} == {"cache", "sha256"}  # the checked one is what JAX uses
    assert run(home=tmp_path) == ("cpu 42 1", "")
    assert run("--no-compile-cache", home=tmp_path) == ("cpu 42 0", "")


def test_the_users_folder_is_used_and_left_as_it_is(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o755)
    for hits in (0, 1):
        assert run(home=tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(mine)) == (f"cpu 42 {hits}", "")
    assert mine.stat().st_mode & 0o777 == 0o755 and names(mine) and not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "variable",
    [
        {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"},
        {"JAX_COMPILATION_CACHE_MAX_SIZE": "0"},
    ],
)
def test_jaxs_own_variables_hold(variable, tmp_path):
    assert run(home=tmp_path, **variable) == ("cpu 42 0", "")
    assert not names(tmp_path / "fastkv_jax" / "compiled")


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_what_is_damaged_is_compiled_again_and_said_to_nobody(variable, tmp_path):
    run(home=tmp_path, **{variable: str(tmp_path)})
    folder = tmp_path / "fastkv_jax" / "compiled" if variable == "XDG_CACHE_HOME" else tmp_path
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"", flipped):
        for path in folder.iterdir():
            path.write_bytes(damage(path.read_bytes()))
        assert run(home=tmp_path, **{variable: str(tmp_path)}) == ("cpu 42 0", "")
    assert run(home=tmp_path, **{variable: str(tmp_path)}) == ("cpu 42 1", "")  # and put in its place


def flipped(data: bytes) -> bytes:
    """One bit is another: nothing that decompresses need notice."""
    at = random.Random(0).randrange(len(data))
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_a_folder_that_cannot_be_is_one_line_and_the_run_goes_on(tmp_path):
    (tmp_path / "file").write_text("mine")
    blocked = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")}
    out, err = run(home=tmp_path, **blocked)
    assert out == "cpu 42 0" and err.count("\n") == 1
    assert err.startswith(f"warning: compiled programs are not kept in {tmp_path}/file: ")
    assert run("--quiet", home=tmp_path, **blocked) == ("cpu 42 0", "")
    assert run(home=tmp_path / "file") == ("cpu 42 0", "")  # no home: costs compile time, nothing else


def test_xla_is_silent_under_quiet(tmp_path):
    """It complains of a program that was compiled for another CPU."""
    run(home=tmp_path)
    for entry in (tmp_path / "fastkv_jax" / "compiled").glob("*-cache"):
        changed = zlib.decompress(entry.read_bytes())
        features = [name for name in (b"+avx2", b"+sse2", b"+neon", b"+fp-armv8") if name in changed]
        assert features
        entry.write_bytes(zlib.compress(changed.replace(features[0], b"+x" + features[0][2:])))
        entry.with_name(entry.name.removesuffix("-cache") + "-sha256").unlink()
    assert "not  supported on the host" in run(home=tmp_path)[1]
    assert run("--quiet", home=tmp_path) == ("cpu 42 1", "")


# ----------------------------------------------------------------------------------------------------- entries


def test_an_entry_of_another_program_is_believed(tmp_path):
    (tmp_path / "a-cache").write_bytes(b"theirs")
    assert Programs(tmp_path, None).get("a") == b"theirs" and Programs(tmp_path, None).get("b") is None


def test_those_not_used_for_longest_make_room(tmp_path):
    programs = Programs(tmp_path, 100)
    for i, key in enumerate("abc"):
        programs.put(key, bytes(30))
        os.utime(tmp_path / f"{key}-cache", (i, i))
    assert programs.get("a") == bytes(30)  # used just now
    programs.put("d", bytes(30))
    assert names(tmp_path) == sorted(f"{key}-{kind}" for key in "acd" for kind in ("cache", "sha256"))
    programs.put("e", bytes(101))
    assert programs.get("e") is None and programs.get("a") is not None  # what never fits displaces nothing
    Programs(tmp_path, None).put("f", bytes(1000))
    assert len(names(tmp_path)) == 8


def test_the_default_limit_is_of_our_own_folder(tmp_path, monkeypatch):
    import jax

    found = []
    monkeypatch.setattr(compile_cache, "_put_in_jax", found.append)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache",
            "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_enable_xla_caches",
        )
    }  # fmt: skip
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        for folder, size in ((None, -1), (None, 7), (str(tmp_path / "mine"), -1), (str(tmp_path / "mine"), 7)):
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_compilation_cache_max_size", size)
            if size == 7:
                monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
            else:
                monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
            compile_cache.use()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert [programs._limit for programs in found] == [2 << 30, 7, None, 7]


def test_several_processes_write_one_entry(tmp_path):
    def write(i: int) -> None:
        for turn in range(20):
            Programs(tmp_path, 10_000).put("a", bytes([i]) * (100 + turn))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert Programs(tmp_path, None).get("a") is not None and len(names(tmp_path)) == 2


def test_what_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").touch()
    programs = Programs(tmp_path / "file", None)
    with pytest.warns(UserWarning, match="compiled programs are not kept in .*file"):
        programs.put("a", b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        programs.put("a", b"x")
        assert programs.get("a") is None


def test_a_program_that_was_killed_while_writing_leaves_nothing_that_is_believed(tmp_path):
    programs = Programs(tmp_path, None)
    programs.put("a", b"old")
    (tmp_path / "a-sha256").write_bytes(compile_cache._sum(b"new"))  # killed before the entry was renamed
    assert programs.get("a") is None
    programs.put("a", b"new")
    assert programs.get("a") == b"new"


# ---------------------------------------------------------------------------------------------------- platforms


@pytest.mark.parametrize(
    ("wanted", "present", "platforms"),
    [
        ("cpu", "cpu,cuda", "cpu"),
        ("cpu", " cuda , cpu ", "cpu"),
        ("cpu", "", "cpu"),
        ("cpu", " , ", "cpu"),
        ("gpu", "cpu,cuda", "cuda"),
        ("gpu", "gpu", "cuda"),
        ("gpu", "rocm,cpu", "rocm"),
        ("gpu", "", "cuda"),
        ("tpu", "tpu,cpu", "tpu"),
        ("auto", " cpu,,", "cpu"),
        ("auto", "cuda, cpu", "cuda,cpu"),
        ("auto", "", ""),
    ],
)
def test_a_platform_in_the_list_is_no_contradiction(wanted, present, platforms):
    assert common._platforms(wanted, present) == platforms


@pytest.mark.parametrize(
    ("wanted", "present"), [("cpu", "cuda,tpu"), ("gpu", "cpu, tpu"), ("tpu", "cpu"), ("tpu", ",gpu")]
)
def test_a_platform_that_is_not_in_the_list_is(wanted, present):
    with pytest.raises(BackendError, match=f"--platform {wanted} contradicts JAX_PLATFORMS={present} in the"):
        common._platforms(wanted, present)


def test_a_plugin_without_its_device_is_silent_under_quiet(tmp_path):
    """libtpu is installed for its compiler; here it looks for a TPU."""
    found = {"TPU_WORKER_HOSTNAMES": "", "TPU_ACCELERATOR_TYPE": ""}
    assert run("--no-compile-cache", "--quiet", "--platform", "auto", home=tmp_path, **found) == ("cpu 42 0", "")


def test_a_command_runs_on_its_part_of_the_list(tmp_path):
    assert run("--no-compile-cache", home=tmp_path, JAX_PLATFORMS="cuda, cpu") == ("cpu 42 0", "")
