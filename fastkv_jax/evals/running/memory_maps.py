"""A long run on a CPU must not end with Linux's limit on memory maps: each program XLA compiles takes several."""

from pathlib import Path

import jax

MOST = 20_000  # of Linux's 65,530 (vm.max_map_count)


def forget_programs_if_many(most: int = MOST) -> None:
    """Drop JAX's compiled programs, which are then compiled again when needed, if this process has more maps."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()
