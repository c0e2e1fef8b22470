"""The operations of token eviction and of a decode step, each in a folder of its own, specified by a short reference.

    window_scores      how much the last W queries attend to every key, pooled and summed over each GQA group
    select             the exact top-k positions of a score, ascending, ties to the lowest index, without a sort
    decode_attention   one query per row against frozen prompt entries and the decoded ones
    append             a step's queries and keys rotated, keys and values written to the decoded ones
    quantize           keys and values in 8 bits for it
    linear             a few rows times one matrix of a stack of layers, and what is added to it
    projections, gated the same with a norm in front, for several matrices and for the two of an MLP

Each runs as the reference, or as the kernels of a platform: implementation="tpu" or "gpu".

Letters: B batch, H query heads, K KV heads, G = H/K, N cache heads, W window, T tokens, C capacity, M new tokens,
D head dim.
"""

from kernels_pallas.append import append
from kernels_pallas.decode_attention import Slots, decode_attention, quantize
from kernels_pallas.linear import Norm, gated, linear, projections
from kernels_pallas.select import among_best, select
from kernels_pallas.window_scores import pool, window_scores

__all__ = [
    "Norm",
    "Slots",
    "among_best",
    "append",
    "decode_attention",
    "gated",
    "linear",
    "pool",
    "projections",
    "quantize",
    "select",
    "window_scores",
]
