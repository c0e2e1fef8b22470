"""Ask a suite's questions; see --help."""

import sys

from fastkv_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
