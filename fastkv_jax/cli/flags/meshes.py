"""--mesh data=2,tensor=4: which devices share what."""

from typing import Any

from fastkv_jax.errors import FastKVConfigError

HELP = "split rows, heads or a prompt's tokens over devices: data=2,tensor=4,sequence=1 (default: one device)"


def parse(text: str | None) -> dict[str, int]:
    """{axis: size}; raises `FastKVConfigError` before JAX has started."""
    from fastkv_jax.model.sharding import DATA, MODEL, SEQUENCE

    names = {"data": DATA, "tensor": MODEL, "sequence": SEQUENCE}
    found: dict[str, int] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, size = part.partition("=")
        if name not in names or not equals or not size.isdecimal() or int(size) < 1:
            raise FastKVConfigError(f"--mesh takes data=N,tensor=N,sequence=N with N >= 1, got {part!r}")
        if names[name] in found:
            raise FastKVConfigError(f"--mesh names {name} twice")
        found[names[name]] = int(size)
    return found


def build(axes: dict[str, int]) -> Any:
    """The mesh of this process's devices, None for an empty one; raises `FastKVConfigError` if there are too few."""
    import math

    import jax

    if not axes:
        return None
    wanted, devices = math.prod(axes.values()), jax.local_devices()
    if wanted > len(devices):
        raise FastKVConfigError(f"--mesh wants {wanted} devices, this process has {len(devices)}")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices[:wanted])
