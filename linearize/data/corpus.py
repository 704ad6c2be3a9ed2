"""Turn sources into one array of training tokens and, per source, held-out tokens that are never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from linearize.data.encoding import Encoder, Piece, pieces
from linearize.data.files import Document
from linearize.data.grams import Grams
from linearize.data.heldout import divide
from linearize.data.mixture import Source, name_of, shares
from linearize.data.strips import Labels, Mask, Starts, Strip, Tokens, interleave, join
from linearize.errors import DataError

Progress = Callable[[int, int], None]

_BATCH = 1_000_000  # characters tokenised between two reports of progress
_CHARACTERS_PER_TOKEN = 5  # a little more than usual, so that few batches are needed
_FORMAT = 1  # of what is built from the same text; raise it when the same arguments give other tokens


@dataclass(frozen=True)
class Budget:
    """How much of the text is wanted, and in which order.

    Attributes:
        train_tokens: size of `Corpus.tokens`, exactly.
        heldout_tokens: held-out tokens over all sources, at most. Fewer when there is not that much.
        seed: orders the documents.
        drop_overlap: documents of whose n-grams more than this share stand in held-out text do not train; None keeps
            all. A text longer than a million characters is judged in parts.
    """

    train_tokens: int
    heldout_tokens: int
    seed: int = 0
    drop_overlap: float | None = None


class Part(NamedTuple):
    """What one source gave.

    Attributes:
        name: where the text comes from.
        tokens: of `Corpus.tokens`.
        epochs: tokens / tokens of one pass over the source; 1.0 while it was enough.
        dropped: documents left out because they overlap with held-out text.
    """

    name: str
    tokens: int
    epochs: float
    dropped: int


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, in training order, and held-out text.

    Attributes:
        name: where the text comes from.
        fingerprint: of the sources, the tokenizer and the budget.
        tokens: int32 [N]; the documents one after another. Texts end with the tokenizer's EOS token, conversations as
            their template ends them.
        document_starts: int64 [D]; indices into `tokens` at which a document starts, ascending, the first is 0.
        epochs: N / tokens of one pass over the text; 1.0 while the text was enough.
        heldout: source -> int32 tokens, documents one after another, in all about the budget. May be empty.
        targets: bool [N]; True for tokens that are to be predicted: of conversations, the replies. None = all.
        labels: names of the documents' sources, and document_labels: int32 [D], indices into it. Empty when unknown.
        parts: one for each source that was given.
    """

    name: str
    fingerprint: str
    tokens: Tokens
    document_starts: Starts
    epochs: float
    heldout: dict[str, Tokens]
    targets: Mask | None = None
    labels: tuple[str, ...] = ()
    document_labels: Labels | None = None
    parts: tuple[Part, ...] = ()

    def remarks(self) -> list[str]:
        """What a reader should know about the sources, in sentences."""
        said = []
        for part in self.parts:
            if part.epochs > 1:
                said.append(f"{part.name} is used {part.epochs:.1f} times: it has fewer tokens than its budget.")
            if part.dropped:
                said.append(f"{part.name}: {part.dropped:,} documents that overlap with held-out text are left out.")
        return said


def corpus_fingerprint(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    against: Mapping[str, Tokens] | None = None,
) -> str:
    """Of all that decides what `build_corpus` gives; found without reading a document."""
    texts = [(source.documents.fingerprint, source.weight) for source in sources]
    shunned = [] if budget.drop_overlap is None else sorted((against or {}).items())
    heldout = [(name, hashlib.sha256(tokens.tobytes()).hexdigest()) for name, tokens in shunned]
    identity = (_FORMAT, texts, Encoder.of(tokenizer).fingerprint(), budget, heldout)
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def build_corpus(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    against: Mapping[str, Tokens] | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Read, split and tokenise just enough documents, in the order of the budget's seed.

    Each source gives its share of the tokens and of the held-out text, and their documents are interleaved so that
    every beginning of the corpus holds each source at its share. What is held out: `linearize.data.heldout.divide`. A
    source smaller than its share is repeated, its documents in a new order each time; in a pass every token of a
    document comes exactly once.

    Args:
        sources: the text.
        tokenizer: with an EOS token; no other special token is added to texts.
        budget: how much.
        against: further held-out tokens for `Budget.drop_overlap`.
        progress: called with (training tokens so far, all of them).

    Raises:
        DataError: a source holds no text to train on, or the tokenizer has no EOS token, or no chat template although
            there are conversations.
    """
    encode = Encoder.of(tokenizer)
    weights = shares(sources)
    sizes = _split_evenly(budget.train_tokens, weights)
    divided = [
        divide(source.documents, budget.seed, encode, tokens)
        for source, tokens in zip(sources, _split_evenly(budget.heldout_tokens, weights), strict=True)
    ]
    heldout = _join_heldout([part.heldout for part in divided])
    shunned = None
    if budget.drop_overlap is not None:
        shunned = Grams.of([*heldout.values(), *(against or {}).values()], tokenizer)
    names: dict[str, int] = {}
    strips, parts = [], []
    for source, part, size in zip(sources, divided, sizes, strict=True):
        reader = _Reader(encode, names, shunned, budget.drop_overlap, progress)
        strip = _enough(source, reader, part.training, size, budget.seed)
        strips.append(strip.cut(size) if strip.size >= size else strip.shuffled_to(size, budget.seed))
        parts.append(Part(source.documents.name, size, max(1.0, size / strip.size), reader.dropped))
    whole = interleave(strips, weights)
    return Corpus(
        name=name_of(sources),
        fingerprint=corpus_fingerprint(sources, tokenizer, budget, against),
        tokens=whole.tokens,
        document_starts=whole.starts,
        epochs=whole.size / sum(part.tokens / part.epochs for part in parts),
        heldout=heldout,
        targets=whole.targets,
        labels=tuple(names),
        document_labels=whole.labels,
        parts=tuple(parts),
    )


def _split_evenly(tokens: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in these proportions that sum to `tokens`."""
    ends = np.rint(np.cumsum(weights) * tokens).astype(int)
    ends[-1] = tokens
    return [int(size) for size in np.diff(ends, prepend=0)]


def _join_heldout(parts: Sequence[Mapping[str, Tokens]]) -> dict[str, Tokens]:
    names = sorted({name for part in parts for name in part})
    return {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}


def _enough(source: Source, reader: "_Reader", documents: Iterator[Document], size: int, seed: int) -> Strip:
    """The first documents of a source, `size` tokens or, where there are not that many, all.

    Raises:
        DataError: there are none.
    """
    name = source.documents.name
    if size == 0:
        raise DataError("its share of the tokens is none at all.", place=name, remedy="Raise its weight, or drop it.")
    strip = reader.read(documents, size)
    if strip.size:
        return strip
    if reader.dropped:
        raise DataError(
            f"all its {reader.dropped:,} documents overlap with held-out text.",
            place=name,
            remedy="Raise --drop-overlap, or measure on other text.",
        )
    raise DataError("holds no text to train on.", place=name, remedy="Give more text with --data.")


@dataclass
class _Reader:
    """Tokenises documents until there are enough, without those that overlap too much with held-out text."""

    encode: Encoder
    names: dict[str, int]  # source -> label; grows
    shunned: Grams | None
    threshold: float | None
    progress: Progress | None
    dropped: int = 0

    def read(self, documents: Iterator[Document], size: int) -> Strip:
        """At least `size` tokens, unless the documents end before."""
        todo = pieces(documents)
        strips: list[Strip] = []
        total = 0
        while total < size:
            batch = _take(todo, min(_BATCH, _CHARACTERS_PER_TOKEN * (size - total)))
            if not batch:
                break
            strips.append(self._clean(self._strip(batch)))
            total += strips[-1].size
            if self.progress is not None:
                self.progress(min(total, size), size)
        return join(strips)

    def _strip(self, batch: Sequence[Piece]) -> Strip:
        encoded = self.encode(batch)
        masked = any(part.targets is not None for part in encoded)
        sizes = [part.tokens.size for part in encoded]
        # Where documents may be dropped, the rest of one that the batch cuts is a document of its own.
        opens = [piece.first or (self.shunned is not None and i == 0) for i, piece in enumerate(batch)]
        starts = (np.cumsum(sizes) - sizes)[opens]
        labels = [self.names.setdefault(piece.source, len(self.names)) for piece in batch]
        targets = [np.ones(part.tokens.size, bool) if part.targets is None else part.targets for part in encoded]
        return Strip(
            np.concatenate([part.tokens for part in encoded]),
            starts.astype(np.int64),
            np.array(labels, dtype=np.int32)[opens],
            np.concatenate(targets) if masked else None,
        )

    def _clean(self, strip: Strip) -> Strip:
        if self.shunned is None or self.threshold is None:
            return strip
        kept = self.shunned.share_of(strip) <= self.threshold
        self.dropped += int((~kept).sum())
        return strip if kept.all() else strip.ordered(np.flatnonzero(kept))


def _take(todo: Iterator[Piece], characters: int) -> list[Piece]:
    """The next pieces, until they have that many characters."""
    batch: list[Piece] = []
    taken = 0
    while taken < characters and (piece := next(todo, None)) is not None:
        batch.append(piece)
        taken += piece.characters + 1
    return batch
