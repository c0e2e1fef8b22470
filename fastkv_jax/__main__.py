"""python -m fastkv_jax COMMAND: the scripts under one name."""

import sys

from fastkv_jax.cli import commands

if __name__ == "__main__":
    sys.exit(commands.main())
