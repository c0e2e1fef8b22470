"""Compile for accelerators that need not be there; see fastkv_jax/cli/aot_compile.py."""

from fastkv_jax.cli.aot_compile import main
from fastkv_jax.cli.flags.common import leave

if __name__ == "__main__":
    leave(main())
