"""python -m fastkv_jax COMMAND: the scripts under one name."""

from fastkv_jax.cli.commands import console

if __name__ == "__main__":
    console()
