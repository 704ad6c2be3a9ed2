"""Text and conversations into tokens, in pieces that a tokenizer takes at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from linearize.data.chat import Conversation, spell_conversations
from linearize.data.files import Content, Document
from linearize.data.strips import Mask, Tokens
from linearize.errors import DataError

_PIECE = 32_768  # characters handed to the tokenizer at once


class Piece(NamedTuple):
    """A part of a text, or a whole conversation."""

    source: str
    content: Content
    first: bool  # of its document
    last: bool

    @property
    def characters(self) -> int:
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(message.content) for message in self.content)


class Encoded(NamedTuple):
    """Tokens of a piece, and which of them are to be predicted; None = all."""

    tokens: Tokens
    targets: Mask | None


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as a function from pieces to int32 tokens; texts end with EOS, conversations as in their template."""

    tokenizer: PreTrainedTokenizerBase
    eos: Tokens

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        """
        Raises:
            DataError: the tokenizer has no EOS token.
        """
        if tokenizer.eos_token_id is None:
            raise DataError(
                "has no end-of-text token, so documents cannot be told apart.",
                place="tokenizer",
                remedy="Set tokenizer.eos_token.",
            )
        return cls(tokenizer, np.array([tokenizer.eos_token_id], dtype=np.int32))

    def __call__(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The pieces in tokens, EOS after the last piece of each text; of conversations only replies are targets.

        Raises:
            DataError: the tokenizer's chat template is missing or does not fit.
        """
        texts = iter(self._texts([piece.content for piece in pieces if isinstance(piece.content, str)]))
        chats = iter(self._chats([piece.content for piece in pieces if not isinstance(piece.content, str)]))
        encoded = []
        for piece in pieces:
            if isinstance(piece.content, str):
                tokens = next(texts)
                encoded.append(Encoded(np.concatenate([tokens, self.eos]) if piece.last else tokens, None))
            else:
                encoded.append(next(chats))
        return encoded

    def at_most(self, document: Document, limit: int) -> Tokens:
        """The first `limit` tokens of a document; reads no more text than that takes."""
        parts: list[Tokens] = []
        found = 0
        for piece in pieces([document]):
            if found >= limit:
                break
            (encoded,) = self([piece])
            parts.append(encoded.tokens)
            found += encoded.tokens.size
        return np.concatenate(parts)[:limit]

    def fingerprint(self) -> str:
        """Of all that decides how text is spelt."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            spelling = json.loads(tokenizer.backend_tokenizer.to_str())
            spelling |= {"padding": None, "truncation": None}  # left behind by whoever called it last
        else:
            spelling = sorted(tokenizer.get_vocab().items())
        identity = json.dumps([spelling, tokenizer.eos_token_id, tokenizer.chat_template])
        return hashlib.sha256(identity.encode()).hexdigest()

    def _texts(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _chats(self, conversations: list[Conversation]) -> list[Encoded]:
        if not conversations:
            return []
        return [Encoded(*spelt) for spelt in spell_conversations(self.tokenizer, conversations)]


def pieces(documents: Iterable[Document]) -> Iterator[Piece]:
    """Cut long texts between a word and white space, where byte-level tokenizers cut as well.

    A tokenizer without such a cut (SentencePiece) may spell the seam differently: one word in 32,768 characters.
    """
    for source, content in documents:
        if not isinstance(content, str):
            yield Piece(source, content, True, True)
            continue
        start = 0
        while len(content) - start > _PIECE:
            end = gap_before(content, start + _PIECE)
            yield Piece(source, content[start:end], start == 0, False)
            start = end
        yield Piece(source, content[start:], start == 0, True)


def gap_before(text: str, end: int) -> int:
    """The last index <= end < len(text) at which white space follows a word, not far away; else `end`."""
    for index in range(end, max(0, end - _PIECE // 2), -1):
        if text[index].isspace() and text[index - 1].isalnum():
            return index
    return end
