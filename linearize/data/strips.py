"""Documents laid end to end as arrays, and how they are cut, reordered and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Strip:
    """Documents laid end to end.

    Attributes:
        tokens: int32 [N].
        starts: int64 [D]; where documents start, ascending, the first is 0.
        labels: int32 [D]; a number for each document's source.
        targets: bool [N]; True for tokens that are to be predicted. None = all of them.
    """

    tokens: Tokens
    starts: Starts
    labels: Labels
    targets: Mask | None

    @property
    def size(self) -> int:
        return int(self.tokens.size)

    @property
    def lengths(self) -> Starts:
        """Tokens of each document."""
        return np.diff(self.starts, append=self.size)

    def cut(self, size: int) -> "Strip":
        """The first `size` tokens; the last document may be cut."""
        documents = int(np.searchsorted(self.starts, size))
        targets = None if self.targets is None else self.targets[:size]
        return Strip(self.tokens[:size], self.starts[:documents], self.labels[:documents], targets)

    def ordered(self, order: npt.NDArray[np.int64]) -> "Strip":
        """The documents of those numbers, in that order."""
        lengths = self.lengths[order]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        index = np.repeat(self.starts[order] - starts, lengths) + np.arange(ends[-1] if ends.size else 0)
        targets = None if self.targets is None else self.targets[index]
        return Strip(self.tokens[index], starts, self.labels[order], targets)

    def shuffled_to(self, size: int, seed: int) -> "Strip":
        """These documents over and over, each time in a new order after the first, until there are `size` tokens."""
        assert self.size
        generator = np.random.default_rng(seed)
        strips, missing = [self], size - self.size
        while missing > 0:
            order = generator.permutation(self.starts.size)
            needed = int(np.searchsorted(np.cumsum(self.lengths[order]), missing)) + 1
            strips.append(self.ordered(order[:needed]))  # no more documents than fit
            missing -= strips[-1].size
        return join(strips).cut(size)


def join(strips: Sequence[Strip]) -> Strip:
    """One after another."""
    sizes = [strip.size for strip in strips]
    offsets = np.cumsum([0, *sizes])[: len(sizes)]
    targets: Mask | None = None
    if any(strip.targets is not None for strip in strips):
        targets = np.concatenate(
            [np.ones(strip.size, dtype=bool) if strip.targets is None else strip.targets for strip in strips]
        )
    return Strip(
        np.concatenate([np.empty(0, np.int32), *(strip.tokens for strip in strips)]),
        np.concatenate(
            [np.empty(0, np.int64), *(s.starts + offset for s, offset in zip(strips, offsets, strict=True))]
        ),
        np.concatenate([np.empty(0, np.int32), *(strip.labels for strip in strips)]),
        targets,
    )


def interleave(strips: Sequence[Strip], weights: Sequence[float]) -> Strip:
    """Merge strips document by document so that every beginning of the result holds each at its weight.

    A document comes when its strip has given as many tokens for each unit of its weight as the others: no strip is
    ahead of its weight by more than one document, and a longer strip's order begins like a shorter one's.
    """
    if len(strips) == 1:
        return strips[0]
    due = np.concatenate([strip.starts / weight for strip, weight in zip(strips, weights, strict=True)])
    return join(strips).ordered(np.argsort(due, kind="stable"))
