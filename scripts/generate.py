"""Answer prompts; see --help."""

import sys

from fastkv_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
