"""Which text is kept away from training, by a rule that depends on the text alone; and held-out text of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from linearize.data.encoding import Encoder, gap_before
from linearize.data.files import Content, Document
from linearize.data.sources import Documents, open_documents
from linearize.data.strips import Tokens

_PER_MILLE = 20  # documents whose hash puts them on the held-out side
_FEW_DOCUMENTS = 500  # below this a hash might hold out nothing, so a part of every document is held out instead
_TAIL = 0.05  # share of the characters, or of the conversations, held out then
_SCAN = 64_000_000  # characters of a Hub stream read in search of held-out text alone


class Divided(NamedTuple):
    """Documents of which the held-out side was searched.

    Attributes:
        training: the documents' training side, in order; ends where the documents do.
        heldout: source -> int32 tokens, documents one after another.
    """

    training: Iterator[Document]
    heldout: dict[str, Tokens]


def divide(documents: Documents, seed: int, encode: Encoder, budget: int) -> Divided:
    """Search held-out text of at most `budget` tokens, and give the rest to train on.

    About 2 % of the documents never train: those whose text hashes to the held-out side. Copies of a document fall on
    the same side, in any order and with any seed. With fewer than 500 documents the last 5 % of each text is held out
    instead, and of conversations the 5 % with the smallest hashes. A stream is searched for 64M characters at most.

    Raises:
        DataError: the documents cannot be read.
    """
    stream = documents.read(seed)
    read = list(islice(stream, _FEW_DOCUMENTS))
    rule = _Rule.of(read)
    parts: dict[str, list[Tokens]] = {}
    seen: set[bytes] = set()
    found = scanned = 0
    for source, content in _lengthening(read, stream):
        digest = _digest(content)
        _, held = rule.sides(content, digest)
        if held is not None and digest not in seen and found < budget:
            seen.add(digest)
            tokens = encode.at_most((source, held), budget - found)
            parts.setdefault(source, []).append(tokens)
            found += tokens.size
        scanned += len(content) if isinstance(content, str) else sum(len(message.content) for message in content)
        if found >= budget or (documents.streamed and scanned > _SCAN):
            break
    heldout = {source: np.concatenate(arrays) for source, arrays in sorted(parts.items())}
    return Divided(_training(read, stream, rule), heldout)


def _lengthening(read: list[Document], stream: Iterator[Document]) -> Iterator[Document]:
    """The documents already read, then those of the stream, which are added to `read`."""
    yield from list(read)
    for document in stream:
        read.append(document)
        yield document


def _training(read: list[Document], stream: Iterator[Document], rule: "_Rule") -> Iterator[Document]:
    yield from _kept(iter(read), rule)
    read.clear()
    yield from _kept(stream, rule)


def _kept(documents: Iterator[Document], rule: "_Rule") -> Iterator[Document]:
    for source, content in documents:
        kept, _ = rule.sides(content, _digest(content))
        if kept is not None:
            yield source, kept


class _Rule(NamedTuple):
    """How a document is divided: at its end when there are few, else by its hash.

    `chosen` are the hashes of the conversations that are held out when there are few, as they cannot be cut.
    """

    few: bool
    chosen: frozenset[bytes]

    @classmethod
    def of(cls, first: list[Document]) -> "_Rule":
        few = len(first) < _FEW_DOCUMENTS
        chats = sorted({_digest(content) for _, content in first if not isinstance(content, str)}) if few else []
        chosen = chats[: max(1, int(len(chats) * _TAIL))] if len(chats) > 1 else []
        return cls(few, frozenset(chosen))

    def sides(self, content: Content | None, digest: bytes) -> tuple[Content | None, Content | None]:
        """What of a document trains, and what is held out."""
        if self.few and isinstance(content, str):
            tail = int(len(content) * _TAIL)
            cut = gap_before(content, len(content) - tail) if tail else len(content)
            return _unless_blank(content[:cut]), _unless_blank(content[cut:])
        content = _unless_blank(content) if isinstance(content, str) else content
        out = digest in self.chosen if self.few else int.from_bytes(digest) % 1000 < _PER_MILLE
        return (None, content) if out else (content, None)


def _unless_blank(text: str) -> str | None:
    return text if text.strip() else None


def _digest(content: Content) -> bytes:
    text = content.strip() if isinstance(content, str) else json.dumps(content)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def heldout_from(
    path: str, text_field: str | None, tokenizer: PreTrainedTokenizerBase, tokens_per_source: int
) -> dict[str, Tokens]:
    """The first `tokens_per_source` tokens of each source of a separate held-out text.

    Args:
        path: whatever `open_documents` takes.
        text_field: column that holds the text.
        tokenizer: with an EOS token, which ends each text; conversations are spelt whole with its chat template.
        tokens_per_source: at most this many int32 tokens a source.

    Raises:
        DataError: the text cannot be read.
    """
    documents, encode = open_documents(path, text_field), Encoder.of(tokenizer)
    parts: dict[str, list[Tokens]] = {}
    found: dict[str, int] = {}
    unused = 0  # characters since the last document that was taken; a Hub stream may have no end
    for source, content in documents:
        missing = tokens_per_source - found.get(source, 0)
        if missing > 0:
            tokens = encode.at_most((source, content), missing)
            parts.setdefault(source, []).append(tokens)
            found[source] = found.get(source, 0) + tokens.size
            unused = 0
            continue
        unused += len(content)
        if documents.streamed and unused > _SCAN:
            break
    return {source: np.concatenate(arrays) for source, arrays in sorted(parts.items())}
