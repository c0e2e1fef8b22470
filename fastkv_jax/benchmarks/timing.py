"""What a benchmark's contestants have in common."""

from typing import NamedTuple

import numpy as np

TRANSFORMERS = "transformers"  # the name of a contestant


class Timing(NamedTuple):
    """Seconds of one run."""

    prefill: float
    decode: float  # of a token, after the first few
    whole: float  # from the prompt to the last token
    logits: np.ndarray  # [B, V] of the last tokens
