"""Answer prompts; see --help."""

from fastkv_jax.cli.flags.common import leave
from fastkv_jax.cli.generate import main

if __name__ == "__main__":
    leave(main())
