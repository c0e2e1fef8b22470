"""Choose the TSP layer, window and kernel for a model; see --help."""

from fastkv_jax.cli.calibrate import main
from fastkv_jax.cli.flags.common import leave

if __name__ == "__main__":
    leave(main())
