"""Time prefill and decode; see --help."""

import sys

from fastkv_jax.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
