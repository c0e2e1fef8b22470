"""Write a long document of our own making, with a few facts hidden in it: `make_document.py --words 2500`."""

import argparse
import sys

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals.texts.documents import document
from fastkv_jax.seeds import check_seed


def main() -> int:
    """Print the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0, help="0 to 2**32 - 1")
    options = parser.parse_args()
    try:
        check_seed(options.seed)
    except FastKVConfigError as error:
        parser.error(str(error))
    sys.stdout.write(document(options.words, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
