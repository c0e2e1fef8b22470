"""How far numbers may be apart, all in one place: absolute, float32 unless said."""

import numpy as np

LOGITS = 1e-4  # next-token logits of the small models against a recording or the float64 oracle
CACHE = 2e-4  # keys and values against the same
FLOAT16 = 5e-3  # both, where the recorded code computed attention in float16
SAME = 2e-5  # the library against itself by another route (padding, batch, mesh): only the order of sums differs
SCORES = 1e-6  # window scores against float64, a row of weights sums to 1
SCORES_RELATIVE = 1e-5  # beside it: heads of a group and averages add up
ATTENTION = 5e-6  # attention against float64
ATTENTION_LARGE = 1e-4  # the same with logits of size 1000, whose float32 error is 1000 times the unit's
ATTENTION_BF16 = 3e-2  # values of size 1 in bfloat16 (8 bits), averaged
LOGITS_BF16 = 0.5  # four random layers in bfloat16, logits of size 3: the right order of magnitude, no more

REAL_LOGITS = 5e-3  # a trained model of 30 layers against its recording
REAL_SETS = 0.002  # share of a kept set that may differ: a few boundaries of real text lie within float noise
REAL_GAP = 1e-2  # greedy tokens agree up to the first step whose two best logits are closer than this


def of_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The most by which float32's x @ weight.T [B, O] can be wrong, in whatever order its terms are added.

    n products and n - 1 sums round by u = 2^-24 each: n u / (1 - n u) of the sum of the terms' sizes (Higham, Accuracy
    and Stability of Numerical Algorithms, 2002, section 3.1). One operand in bfloat16 or TF32 is far beyond it.
    """
    rounding = x.shape[-1] * 2.0**-24
    return rounding / (1 - rounding) * (abs(x) @ abs(weight).T)
