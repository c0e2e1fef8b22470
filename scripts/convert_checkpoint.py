"""Convert a model into this project's own checkpoint: `python scripts/convert_checkpoint.py SOURCE DEST`."""

import sys

from fastkv_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
