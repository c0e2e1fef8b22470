"""What one prompt left behind, as arrays that can be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class Kept:
    """What one prompt left behind, by true positions 0 ... n - 1.

    Attributes:
        token_ids: [n]
        words: the text of each token, "" where a character goes on in the next one; ids where there is no tokenizer
        has_text: whether `words` are texts
        kept: [L, N, n], whether a head of a layer keeps a position
        heads: [L], cache heads of each layer; N is the most of any layer, and rows beyond a layer's own are False
        propagated: [n], whether a position passed the last TSP layer; None where nothing was left behind
    """

    token_ids: Int[np.ndarray, " n"]
    words: tuple[str, ...]
    has_text: bool
    kept: Bool[np.ndarray, "L N n"]
    heads: tuple[int, ...]
    propagated: Bool[np.ndarray, " n"] | None

    @property
    def share(self) -> Float[np.ndarray, " n"]:
        """The share of all (layer, head) pairs that keep each position."""
        return self.kept.sum((0, 1)) / sum(self.heads)

    @property
    def boundary(self) -> int | None:
        """The first layer from which on only propagated positions are kept; None where that divides nothing.

        Read off what was kept: the layer after the TSP layer, unless that one kept nothing but propagated positions.
        """
        if self.propagated is None or self.propagated.all():
            return None
        strays = np.flatnonzero((self.kept & ~self.propagated).any((1, 2)))
        first = int(strays[-1]) + 1 if strays.size else 0
        return first if first < len(self.heads) else None

    def summary(self) -> str:
        """Two lines for people."""
        n, pairs = len(self.token_ids), sum(self.heads)
        everywhere = int((self.kept.sum((0, 1)) == pairs).sum())
        kept = (
            f"{n:,} tokens, {len(self.heads)} layers x {_span(self.heads)} heads: "
            f"{100 * self.kept.sum() / (n * pairs):.1f} % of the KV entries kept, {everywhere:,} tokens by every head"
        )
        if self.propagated is None:
            return f"{kept}\nall tokens went through all layers"
        passed = int(self.propagated.sum())
        where = "" if self.boundary is None else f" to layers {self.boundary}-{len(self.heads) - 1}"
        return f"{kept}\n{passed:,} tokens ({100 * passed / n:.1f} %) were propagated{where}"


def _span(numbers: Sequence[int]) -> str:
    """3,3,3 -> 3; 3,9 -> 3-9."""
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"
