"""Ask a suite's questions; see --help."""

from fastkv_jax.cli.common import leave
from fastkv_jax.cli.evaluate import main

if __name__ == "__main__":
    leave(main())
