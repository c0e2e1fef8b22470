"""Choose the TSP layer, window and kernel for a model; see --help."""

import sys

from fastkv_jax.cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
