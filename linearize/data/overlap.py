"""How much of the held-out text stands in the training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from linearize.data.cache import load_corpus
from linearize.data.corpus import Budget, Corpus
from linearize.data.grams import RUN, Grams
from linearize.data.heldout import heldout_from
from linearize.data.mixture import choose_sources
from linearize.data.strips import Tokens
from linearize.teacher import load_tokenizer

_HELDOUT_TOKENS = 10_000_000
_MUCH = 0.1  # a document that shares more than this with held-out text is worth a word


class Share(NamedTuple):
    """Runs of a text, and how many of them the other side has."""

    seen: int
    runs: int

    @property
    def share(self) -> float:
        return self.seen / self.runs if self.runs else 0.0


@dataclass(frozen=True)
class Overlap:
    """What training and held-out text share.

    Attributes:
        heldout: source -> its runs, and how many stand in the training text.
        training: source -> its runs, and how many stand in held-out text.
        documents: share of each training document's runs that stand in held-out text, float64 [D].
    """

    heldout: dict[str, Share]
    training: dict[str, Share]
    documents: npt.NDArray[np.float64]

    def lines(self) -> list[str]:
        """What a reader should know, in sentences."""
        shares = ", ".join(f"{name} {share.share:.2%}" for name, share in self.heldout.items())
        said = [f"Held-out text that also stands in the training text, in runs of {RUN} tokens: {shares}."]
        if above := self.above(_MUCH):
            said.append(
                f"{above:,} of {self.documents.size:,} training documents share more than {_MUCH:.0%} of their runs "
                f"with held-out text; --drop-overlap {_MUCH} leaves such documents out."
            )
        return said

    def above(self, threshold: float) -> int:
        """Training documents that `drop_overlap` of this threshold would leave out."""
        return int((self.documents > threshold).sum())


def measure_overlap(corpus: Corpus, heldout: Mapping[str, Tokens], tokenizer: PreTrainedTokenizerBase) -> Overlap:
    """Compare all training text of a corpus with all held-out text.

    Args:
        corpus: the training text.
        heldout: source -> int32 tokens.
        tokenizer: of both.
    """
    grams = Grams.of(heldout.values(), tokenizer)
    hits, seen, runs = grams.hits(corpus.tokens, corpus.document_starts)
    sources = {}
    for name, tokens in heldout.items():
        own = np.concatenate([np.empty(0, np.uint64), *(hashes for hashes, _ in grams.runs(tokens, np.zeros(1, int)))])
        sources[name] = Share(int(np.isin(own, hits).sum()), own.size)
    training = {
        name: Share(int(seen[corpus.document_labels == index].sum()), int(runs[corpus.document_labels == index].sum()))
        for index, name in enumerate(corpus.labels)
    }
    return Overlap(sources, training, seen / np.maximum(runs, 1))


def compare_texts(
    model: str, data: Sequence[str], heldout: str, train_tokens: int, text_field: str | None = None
) -> Overlap:
    """Compare the first tokens of training text with all of a held-out text, in the tokens of a teacher.

    Args:
        model: what `--model` takes.
        data: what `--data` takes.
        heldout: a file, a folder or a Hub data set; of each source 10M tokens at most.
        train_tokens: how much of the training text; a shorter one is repeated, which changes no share.
        text_field: the column of the text, in both.

    Raises:
        LinearizeError: a text or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(model)
    against = heldout_from(heldout, text_field, tokenizer, _HELDOUT_TOKENS)
    sources, _ = choose_sources(data, text_field, None)
    return measure_overlap(load_corpus(sources, tokenizer, Budget(train_tokens, 0)), against, tokenizer)
