"""Convert a model into this project's own checkpoint: `python scripts/convert_checkpoint.py SOURCE DEST`."""

from fastkv_jax.cli.common import leave
from fastkv_jax.cli.convert import main

if __name__ == "__main__":
    leave(main())
