"""Check an accelerator: is it right, and how fast is it? See --help."""

from fastkv_jax.cli.check_device import main
from fastkv_jax.cli.flags.common import leave

if __name__ == "__main__":
    leave(main())
