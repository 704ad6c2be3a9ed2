"""Cut a corpus into packed rows with document boundaries; a micro-batch is found by its number alone.

Shape legend: B rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from linearize.data.corpus import Corpus
from linearize.errors import DataError
from linearize.stages.base import Batch


class PackedRows:
    """The tokens [first_token, first_token + tokens) of a corpus as micro-batches; a sequence of `Batch`.

    The slice is cut into rows of `length`, the rows are permuted by `seed`, and micro-batch i is rows
    [i * rows, (i + 1) * rows) of that order. Tokens left over after the last full row, and rows left over after the
    last full micro-batch, are not used: fewer tokens than one optimiser step takes. A document that a row cuts goes on
    in another row as if it started there. Of conversations only the tokens of replies are targets.

    Args:
        corpus: the tokens.
        length: T, tokens per row.
        rows: B, rows per micro-batch.
        first_token: where the slice starts, so that stages can read different text.
        tokens: size of the slice.
        seed: orders the rows.

    Raises:
        DataError: the slice does not fill one micro-batch or reaches beyond the corpus, or the text before it was
            repeated does not fill one row.
    """

    # Six arguments beside `self`: each is one fact of the slice, and all but the corpus are keywords.
    def __init__(self, corpus: Corpus, *, length: int, rows: int, first_token: int, tokens: int, seed: int) -> None:
        assert length >= 2
        assert rows >= 1
        assert first_token >= 0
        _check_enough(corpus, length, rows, first_token, tokens)
        self._corpus, self._length, self._rows, self._first_token = corpus, length, rows, first_token
        self._order = np.random.default_rng(seed).permutation(tokens // length)
        self._pin = torch.cuda.is_available()  # so that Batch.to copies while the GPU computes

    def __len__(self) -> int:
        """Number of full micro-batches."""
        return self._order.size // self._rows

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch `index`: CPU tensors [B, T], in pinned memory when there is a GPU.

        Raises:
            IndexError: there is no such micro-batch.
        """
        index = range(len(self))[index]
        rows_B = self._order[index * self._rows : (index + 1) * self._rows]
        starts_B = self._first_token + rows_B * self._length
        columns_T = np.arange(self._length)
        input_ids_BT = self._corpus.tokens[starts_B[:, None] + columns_T].astype(np.int64)
        opens_BT = self._document_opens(starts_B)
        target_mask_BT = np.zeros(opens_BT.shape, dtype=bool)
        target_mask_BT[:, :-1] = ~opens_BT[:, 1:]
        if self._corpus.targets is not None:
            target_mask_BT[:, :-1] &= self._corpus.targets[starts_B[:, None] + columns_T[1:]]
        position_ids_BT = columns_T - np.maximum.accumulate(np.where(opens_BT, columns_T, 0), axis=1)
        segments_BT = self._tensor(np.cumsum(opens_BT, axis=1)) if opens_BT.any() else None
        return Batch(
            self._tensor(input_ids_BT), self._tensor(position_ids_BT), segments_BT, self._tensor(target_mask_BT)
        )

    def _document_opens(self, starts_B: np.ndarray) -> np.ndarray:
        """bool [B, T]: True where a document starts inside a row; a row's first column is not inside."""
        documents = self._corpus.document_starts
        low_B = np.searchsorted(documents, starts_B + 1)
        high_B = np.searchsorted(documents, starts_B + self._length)
        opens_BT = np.zeros((starts_B.size, self._length), dtype=bool)
        for row, (start, low, high) in enumerate(zip(starts_B, low_B, high_B, strict=True)):
            opens_BT[row, documents[low:high] - start] = True
        return opens_BT

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin else tensor


def _check_enough(corpus: Corpus, length: int, rows: int, first_token: int, tokens: int) -> None:
    needed = length * rows
    remedy = "Lower it with --set stages.N.length=… or stages.N.batch=…, raise stages.N.tokens, or give more text."
    if tokens < needed:
        raise DataError(
            f"{tokens:,} tokens, but one micro-batch of {rows} rows x {length:,} tokens needs {needed:,}.",
            place=corpus.name,
            remedy=remedy,
        )
    if first_token + tokens > corpus.tokens.size:
        raise DataError(
            f"{corpus.tokens.size:,} tokens, but tokens {first_token:,} to {first_token + tokens:,} are asked for.",
            place=corpus.name,
            remedy="Build the corpus with more tokens.",
        )
    once = round(corpus.tokens.size / corpus.epochs)
    if once < length:
        raise DataError(
            f"the text has {once:,} tokens, less than one row of {length:,}; repeating it would fill rows with copies.",
            place=corpus.name,
            remedy="Lower it with --set stages.N.length=…, or give more text.",
        )
