"""Ask a suite's questions; see --help."""

from fastkv_jax.cli.evaluate import main
from fastkv_jax.cli.flags.common import leave

if __name__ == "__main__":
    leave(main())
