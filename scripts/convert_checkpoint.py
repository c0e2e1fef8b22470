"""Convert a model into this project's own checkpoint: `python scripts/convert_checkpoint.py SOURCE DEST`."""

from fastkv_jax.cli.convert import main
from fastkv_jax.cli.flags.common import leave

if __name__ == "__main__":
    leave(main())
