"""Compile for accelerators that need not be there; see fastkv_jax/cli/aot_compile.py."""

import sys

from fastkv_jax.cli.aot_compile import main

if __name__ == "__main__":
    sys.exit(main())
