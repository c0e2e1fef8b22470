"""Step `device`: versions, what the device is and has, and a first product."""

import importlib.metadata
import platform as machine
import re
import subprocess
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fastkv_jax.device_checks.results import Check, DoesNotFit, Outcome, measured, within
from fastkv_jax.device_checks.tolerances import OF_DTYPE, apart

PACKAGES = re.compile(
    r"fastkv-jax|jax.*|flax|numpy|ml.dtypes|libtpu.*|orbax-checkpoint|transformers|nvidia-(cudnn|cublas).*"
)
SIDE = {"cpu": 256}  # of the first product, elsewhere 4096


def checks(platform: str, quick: bool) -> Iterator[Check]:
    """Three, whatever the platform."""
    yield Check("versions", _versions)
    yield Check("memory", lambda: _memory(platform))
    yield Check(
        "first product", lambda: _product(SIDE.get(platform, 4096), "float32" if platform == "cpu" else "bfloat16")
    )


def memory() -> int | None:
    """Bytes that this process may take on the first device; None where the platform does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def need(size: float) -> None:
    """Raise `DoesNotFit` if the device is known to have less than `size` bytes."""
    there = memory()
    if there is not None and size > there:
        raise DoesNotFit(f"needs {size / 1e9:.1f} GB of {there / 1e9:.1f}")


def _versions() -> Outcome:
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    found = {name: installed[name] for name in sorted(installed, key=str.lower) if PACKAGES.fullmatch(name.lower())}
    found = {"python": machine.python_version(), **found}
    if driver := _driver():
        found["nvidia driver"] = driver
    return measured(", ".join(f"{name} {version}" for name, version in found.items()), **found)


def _driver() -> str:
    """ "" where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _memory(platform: str) -> Outcome:
    devices, there = jax.local_devices(), memory()
    kind = devices[0].device_kind
    said = "memory unknown" if there is None else f"{there / 1e9:.1f} GB for one process"
    capability = getattr(devices[0], "compute_capability", None)
    told = f"{kind} ×{len(devices)}, {said}" + (f", compute capability {capability}" if capability else "")
    return measured(told, device=kind, devices=len(devices), bytes_limit=there, platform=platform)


def _product(side: int, dtype: str) -> Outcome:
    drawn = np.random.default_rng(0)
    a, b = (jnp.asarray(drawn.standard_normal((side, side), np.float32), dtype) for _ in range(2))
    began = time.perf_counter()
    with jax.default_matmul_precision("highest"):
        ours = jax.block_until_ready(a @ b)
    took = time.perf_counter() - began
    rows = slice(0, side, max(side // 64, 1))
    theirs = np.asarray(a[rows], np.float32) @ np.asarray(b, np.float32)
    return within(apart(ours[rows], theirs), OF_DTYPE[dtype], f"{dtype}, {took:.2f} s with its compilation")
