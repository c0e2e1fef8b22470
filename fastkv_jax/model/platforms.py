"""Which platform runs, and whose kernels: said once, at the edge."""

from typing import Literal

Platform = Literal["cpu", "gpu", "tpu"]
Kernels = Literal["reference", "tpu", "gpu"]
KERNELS: dict[Platform, Kernels] = {"cpu": "reference", "gpu": "gpu", "tpu": "tpu"}  # unless a caller says otherwise
