"""Which implementation of an op runs: always the caller's explicit choice, never the default backend's."""

import importlib
from types import ModuleType
from typing import Any, Literal

Implementation = Literal["reference", "tpu", "gpu"]


def kernels(op: str, implementation: Implementation) -> ModuleType:
    """The module with the op's kernels for a platform; imported when first asked for, so that CPU users never pay."""
    if implementation not in ("tpu", "gpu"):
        raise ValueError(f"{op}: implementation must be 'reference', 'tpu' or 'gpu', not {implementation!r}")
    return importlib.import_module(f"kernels_pallas.{op}.{implementation}")


def tpu_interpret(interpret: bool) -> Any:
    """Pallas's `interpret` argument for a TPU kernel.

    The interpreter of TPU kernels simulates the memories: what was never written reads as NaN (the part of a block
    behind the end of its array, too), and a read outside a buffer raises.
    """
    if not interpret:
        return False
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams()
