"""Turn documents into one array of training tokens and, per source, held-out tokens that are never trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from linearize.data.files import Document
from linearize.data.sources import Documents, open_documents
from linearize.errors import DataError

Tokens = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

_HELDOUT_PER_MILLE = 20  # documents whose hash puts them on the held-out side
_FEW_DOCUMENTS = 500  # below this a hash might hold out nothing, so every document's end is held out instead
_TAIL = 0.05  # share of the characters held out then
_PIECE = 32_768  # characters handed to the tokenizer at once
_BATCH = 1_000_000  # characters tokenised between two reports of progress
_CHARACTERS_PER_TOKEN = 5  # a little more than usual, so that few batches are needed
_SCAN = 64_000_000  # characters of a Hub stream read in search of held-out text alone


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, in training order, and held-out text.

    Attributes:
        name: where the text comes from.
        fingerprint: of the source, the tokenizer's vocabulary, the seed and the budgets.
        tokens: int32 [N]; the documents one after another, each ended by the tokenizer's EOS token.
        document_starts: int64; indices into `tokens` at which a document starts, ascending, the first is 0.
        epochs: N / tokens of one pass over the text; 1.0 while the text was enough.
        heldout: source -> int32 tokens, documents one after another, in all about the budget. May be empty.
    """

    name: str
    fingerprint: str
    tokens: Tokens
    document_starts: Starts
    epochs: float
    heldout: dict[str, Tokens]


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer as a function from plain text to int32 tokens; adds no special tokens."""

    tokenizer: PreTrainedTokenizerBase
    eos: Tokens

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_Encoder":
        if tokenizer.eos_token_id is None:
            raise DataError(
                "has no end-of-text token, so documents cannot be told apart.",
                place="tokenizer",
                remedy="Set tokenizer.eos_token.",
            )
        return cls(tokenizer, np.array([tokenizer.eos_token_id], dtype=np.int32))

    def __call__(self, texts: list[str]) -> list[Tokens]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def at_most(self, text: str, limit: int) -> Tokens:
        """The first `limit` tokens of a document with its EOS; reads no more text than that takes."""
        parts: list[Tokens] = []
        found = 0
        for piece in _pieces(text):
            if found >= limit:
                break
            parts += self([piece.text])
            found += parts[-1].size
        return np.concatenate([*parts, self.eos])[:limit]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()


class _Piece(NamedTuple):
    text: str
    first: bool  # of its document
    last: bool


def _pieces(text: str) -> Iterator[_Piece]:
    """Cut a long text between a word and white space, where byte-level tokenizers cut as well.

    A tokenizer without such a cut (SentencePiece) may spell the seam differently: one word in 32,768 characters.
    """
    start = 0
    while len(text) - start > _PIECE:
        end = _gap_before(text, start + _PIECE)
        yield _Piece(text[start:end], start == 0, False)
        start = end
    yield _Piece(text[start:], start == 0, True)


def _gap_before(text: str, end: int) -> int:
    """The last index <= end < len(text) at which white space follows a word, not far away; else `end`."""
    for index in range(end, max(0, end - _PIECE // 2), -1):
        if text[index].isspace() and text[index - 1].isalnum():
            return index
    return end


@dataclass
class _Split:
    """Keeps held-out text away from training, by a rule that depends on the text alone.

    With few documents the end of each is held out; otherwise whole documents, by the hash of their text.
    """

    encode: _Encoder
    budget: int  # held-out tokens
    few: bool
    found: int = 0
    heldout: dict[str, list[Tokens]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.found >= self.budget

    def training_text(self, document: Document) -> str:
        """The part of a document to train on, perhaps empty; takes the other part as long as the budget allows."""
        source, text = document
        digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
        if self.few:
            tail = int(len(text) * _TAIL)
            cut = _gap_before(text, len(text) - tail) if tail else len(text)
        else:
            cut = 0 if int.from_bytes(digest) % 1000 < _HELDOUT_PER_MILLE else len(text)
        kept, held = text[:cut], text[cut:]
        if held.strip() and not self.full and digest not in self.seen:
            self.seen.add(digest)
            tokens = self.encode.at_most(held, self.budget - self.found)
            self.heldout.setdefault(source, []).append(tokens)
            self.found += tokens.size
        return kept if kept.strip() else ""


def build_corpus(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_tokens: int,
    heldout_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> Corpus:
    """Read, split and tokenise just enough documents, in the order of `seed`.

    About 2 % of the documents never train: those whose text hashes to the held-out side. Copies of a document fall on
    the same side, in any order and with any seed. With fewer than 500 documents the last 5 % of each is held out
    instead. A text shorter than the budget is repeated, its documents in a new order each time.

    Args:
        documents: the text.
        tokenizer: with an EOS token; no other special token is added.
        train_tokens: size of `Corpus.tokens`, exactly.
        heldout_tokens: held-out tokens over all sources, at most. Fewer when there is not that much.
        seed: orders the documents.
        progress: called with (training tokens so far, train_tokens).

    Raises:
        DataError: the documents hold no text to train on, or the tokenizer has no EOS token.
    """
    encode = _Encoder.of(tokenizer)
    stream = documents.read(seed)
    first = list(islice(stream, _FEW_DOCUMENTS))
    split = _Split(encode, heldout_tokens, few=len(first) < _FEW_DOCUMENTS)
    texts = filter(None, map(split.training_text, chain(first, stream)))
    tokens, starts = _tokenise(texts, encode, train_tokens, progress)
    if not tokens.size:
        raise DataError("holds no text to train on.", place=documents.name, remedy="Give more text with --data.")
    _search_heldout(texts, split, _SCAN if documents.streamed else None)
    epochs = max(1.0, train_tokens / tokens.size)
    if tokens.size < train_tokens:
        tokens, starts = _repeat(tokens, starts, train_tokens, seed)
        if progress is not None:
            progress(train_tokens, train_tokens)
    identity = (documents.fingerprint, encode.fingerprint(), train_tokens, heldout_tokens, seed)
    return Corpus(
        name=documents.name,
        fingerprint=hashlib.sha256(repr(identity).encode()).hexdigest(),
        tokens=tokens,
        document_starts=starts,
        epochs=epochs,
        heldout={source: np.concatenate(parts) for source, parts in sorted(split.heldout.items())},
    )


def heldout_from(
    path: str, text_field: str | None, tokenizer: PreTrainedTokenizerBase, tokens_per_source: int
) -> dict[str, Tokens]:
    """The first `tokens_per_source` tokens of each source of a separate held-out text.

    Args:
        path: whatever `open_documents` takes.
        text_field: column that holds the text.
        tokenizer: with an EOS token, which ends each document.
        tokens_per_source: at most this many int32 tokens a source.

    Raises:
        DataError: the text cannot be read.
    """
    documents, encode = open_documents(path, text_field), _Encoder.of(tokenizer)
    parts: dict[str, list[Tokens]] = {}
    found: dict[str, int] = {}
    unused = 0  # characters since the last document that was taken; a Hub stream may have no end
    for source, text in documents:
        missing = tokens_per_source - found.get(source, 0)
        if missing > 0:
            tokens = encode.at_most(text, missing)
            parts.setdefault(source, []).append(tokens)
            found[source] = found.get(source, 0) + tokens.size
            unused = 0
            continue
        unused += len(text)
        if documents.streamed and unused > _SCAN:
            break
    return {source: np.concatenate(arrays) for source, arrays in sorted(parts.items())}


def _search_heldout(texts: Iterator[str], split: _Split, limit: int | None) -> None:
    """Read on for held-out text alone: `texts` passes it to `split` on the way."""
    scanned = 0
    while not split.full and (limit is None or scanned < limit):
        text = next(texts, None)
        if text is None:
            return
        scanned += len(text)


def _tokenise(texts: Iterator[str], encode: _Encoder, budget: int, progress: Progress | None) -> tuple[Tokens, Starts]:
    """Tokenise texts until `budget` tokens are there; returns at most that many and where documents start."""
    pieces = (piece for text in texts for piece in _pieces(text))
    parts: list[Tokens] = []
    starts: list[int] = []
    total = 0
    while total < budget:
        batch = _take(pieces, min(_BATCH, _CHARACTERS_PER_TOKEN * (budget - total)))
        if not batch:
            break
        for piece, tokens in zip(batch, encode([piece.text for piece in batch]), strict=True):
            if piece.first:
                starts.append(total)
            parts += [tokens, encode.eos] if piece.last else [tokens]
            total += tokens.size + piece.last
        if progress is not None:
            progress(min(total, budget), budget)
    joined = np.concatenate(parts)[:budget] if parts else np.empty(0, dtype=np.int32)
    document_starts = np.array(starts, dtype=np.int64)
    return joined, document_starts[document_starts < joined.size]


def _take(pieces: Iterator[_Piece], characters: int) -> list[_Piece]:
    """The next pieces, until they have that many characters."""
    batch: list[_Piece] = []
    taken = 0
    while taken < characters and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        taken += len(piece.text) + 1
    return batch


def _repeat(tokens: Tokens, starts: Starts, budget: int, seed: int) -> tuple[Tokens, Starts]:
    """Append the documents of one pass, each time in a new order, until `budget` tokens are there."""
    lengths = np.diff(starts, append=tokens.size)
    generator = np.random.default_rng(seed)
    all_tokens, all_starts = np.empty(budget, dtype=np.int32), [starts]
    all_tokens[: tokens.size] = tokens
    done = tokens.size
    while done < budget:
        order = generator.permutation(starts.size)
        ends = np.cumsum(lengths[order])
        order = order[: int(np.searchsorted(ends, budget - done)) + 1]  # no more documents than fit
        ends = ends[: order.size]
        new_starts = ends - lengths[order]
        index = np.repeat(starts[order] - new_starts, lengths[order]) + np.arange(ends[-1])
        size = min(index.size, budget - done)
        all_tokens[done : done + size] = tokens[index[:size]]
        all_starts.append(done + new_starts)
        done += size
    return all_tokens, np.concatenate(all_starts)
