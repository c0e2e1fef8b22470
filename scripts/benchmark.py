"""Time prefill and decode; see --help."""

from fastkv_jax.cli.benchmark import main
from fastkv_jax.cli.flags.common import leave

if __name__ == "__main__":
    leave(main())
