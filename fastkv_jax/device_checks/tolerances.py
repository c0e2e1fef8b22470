"""How far a device's numbers may be from the reference, all in one place, and why.

An error is relative to the largest number of its vector, the last axis: of an attention output or a row of products
the D or O numbers that belong together. Both sides get the same rounded inputs, and the reference computes in float32
at the highest precision, so that only what the kernel itself rounds is left:

    bfloat16   8 bits, a rounding is 2^-8 at most = 0.4 %: of weights, of a scaled query, and of the result: 4 of them
    float16    11 bits, 2^-11 = 0.05 %: the same four
    float32    sums of up to 2^17 terms, in any order, and exp: near 1e-6. TF32 or a bfloat16 pass, which is what a
               matrix unit does if nobody asks for more, is above 1e-4
    scores     of any dtype as float32: products of 16-bit numbers are exact in it, and nothing else is rounded

Caches of 8 bits are as exact as their queries' dtype: the reference reads the same 8 bits. For float16 their values are
mixed in bfloat16, as scales would vanish (`kernels_pallas.decode_attention.parts.mixed_in`), and so is the tolerance.
"""

import numpy as np

OF_DTYPE = {"bfloat16": 4 * 2.0**-8, "float16": 4 * 2.0**-11, "float32": 5e-5}
SCORES = OF_DTYPE["float32"]

# The model with recorded runs, float32: as tests/golden/README.md says.
LOGITS = 1e-4
# The same in bfloat16 against itself in plain jax.numpy: two orders of rounding through four random layers, logits of
# size 3. Right to the order of magnitude; near ties among the scores may choose other entries.
LOGITS_BFLOAT16 = 0.5
LEAST_COMMON = 0.8  # share of the kept entries that both keep


def apart(ours: object, theirs: object) -> float:
    """The largest difference [..., D], relative to the largest number of its vector; infinite if ours is not finite."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if not np.isfinite(a).all():
        return float("inf")
    size = np.abs(b).max(axis=-1, keepdims=True)
    return float((np.abs(a - b) / np.where(size > 0, size, 1.0)).max(initial=0.0))
