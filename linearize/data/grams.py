"""Runs of 13 tokens of held-out text, hashed, and where they stand in other text.

Tokens are compared by what they spell without case and white space, and tokens without a letter or digit do not count:
a copy with other line breaks, punctuation or capitals is still a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from linearize.data.strips import Mask, Strip, Tokens

RUN = 13
"""Tokens of a run; 13 words is what GPT-3's authors looked for (arXiv 2005.14165, appendix C)."""

_CHUNK = 1 << 20  # tokens hashed at once, so that the arrays stay in the processor's cache
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = 24  # most runs are new: a table of 16 MB says so without a search
_NOT_COUNTED = -1

Hashes = npt.NDArray[np.uint64]


class Hits(NamedTuple):
    """Runs of a text that held-out text has: their hashes, and per document how many of how many."""

    hashes: Hashes
    seen: npt.NDArray[np.int64]
    runs: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grams:
    """The runs of held-out text, ready to be looked for.

    Attributes:
        words: uint64 [V]; a random number for what each token spells.
        counted: bool [V]; whether a token counts.
        hashes: the runs' hashes, ascending, each once.
        filter: bool [2^24]; True at the first 24 bits of each hash.
    """

    words: Hashes
    counted: Mask
    hashes: Hashes
    filter: Mask

    @classmethod
    def of(cls, heldout: Iterable[Tokens], tokenizer: PreTrainedTokenizerBase) -> "Grams":
        """The runs of these texts."""
        numbers = _spellings(tokenizer)
        random = np.random.default_rng(0).integers(0, 2**64, max(1, int(numbers.max()) + 1), dtype=np.uint64)
        empty = cls(random[numbers], numbers != _NOT_COUNTED, np.empty(0, np.uint64), np.empty(0, bool))
        all_hashes = [hashes for tokens in heldout for hashes, _ in empty.runs(tokens, np.zeros(1, int))]
        hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *all_hashes]))
        table = np.zeros(1 << _FILTER_BITS, dtype=bool)
        table[hashes >> np.uint64(64 - _FILTER_BITS)] = True
        return cls(empty.words, empty.counted, hashes, table)

    def share_of(self, strip: Strip) -> npt.NDArray[np.float64]:
        """Of each document's runs, the share that held-out text has: float64 [D]."""
        found = self.hits(strip.tokens, strip.starts)
        return found.seen / np.maximum(found.runs, 1)

    def hits(self, tokens: Tokens, starts: npt.NDArray[np.int64]) -> Hits:
        """Look for every run of these documents."""
        seen, runs = np.zeros(starts.size, np.int64), np.zeros(starts.size, np.int64)
        hashes = [np.empty(0, np.uint64)]
        for run_hashes, documents in self.runs(tokens, starts):
            hit = self._known(run_hashes)
            hashes.append(np.unique(run_hashes[hit]))
            runs += np.bincount(documents, minlength=starts.size)
            seen += np.bincount(documents[hit], minlength=starts.size)
        return Hits(np.unique(np.concatenate(hashes)), seen, runs)

    def runs(self, tokens: Tokens, starts: npt.NDArray[np.int64]) -> Iterator[tuple[Hashes, npt.NDArray[np.int64]]]:
        """The hashes of all runs within documents, and each one's document; some at a time."""
        words, documents = np.empty(0, np.uint64), np.empty(0, np.int64)
        for first in range(0, tokens.size, _CHUNK):
            part = np.asarray(tokens[first : first + _CHUNK])
            counted = self.counted[part]
            owners = np.searchsorted(starts, np.arange(first, first + part.size), side="right") - 1
            words = np.concatenate([words, self.words[part[counted]]])
            documents = np.concatenate([documents, owners[counted]])
            count = words.size - RUN + 1
            if count <= 0:
                continue
            hashes = np.zeros(count, dtype=np.uint64)
            for offset in range(RUN):
                hashes = hashes * _MULTIPLIER + words[offset : offset + count]
            hashes ^= hashes >> np.uint64(32)  # a product's high bits know all of the run, its low bits little
            whole = documents[:count] == documents[RUN - 1 :]
            yield hashes[whole], documents[:count][whole]
            words, documents = words[count:], documents[count:]

    def _known(self, hashes: Hashes) -> Mask:
        known = self.filter[hashes >> np.uint64(64 - _FILTER_BITS)]
        maybe = np.flatnonzero(known)
        if maybe.size:
            place = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), self.hashes.size - 1)
            known[maybe] = self.hashes[place] == hashes[maybe]
        return known


def _spellings(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int64]:
    """int64 [V]: equal for tokens that spell the same but for case and white space; -1 for those that do not count."""
    size = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
    numbers: dict[str, int] = {}
    table = np.full(size, _NOT_COUNTED, dtype=np.int64)
    for index, text in enumerate(tokenizer.batch_decode([[index] for index in range(size)], skip_special_tokens=True)):
        spelling = text.strip().lower()
        if "\ufffd" in spelling:  # a part of a character
            spelling = f"{index}\ufffd"
        elif not any(character.isalnum() for character in spelling):
            continue
        table[index] = numbers.setdefault(spelling, len(numbers))
    return table
