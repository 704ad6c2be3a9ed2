"""What recall tasks share: examples of an exact length in tokens, made from a seed, in two disjoint splits.

A prompt is put together from pieces that are tokenised one at a time. What is hidden in it (a key, a story) belongs to
the test split or to the training split by its hash, so that no training row holds what a test row asks for.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Literal

from transformers import PreTrainedTokenizerBase

from linearize.errors import DataError

Split = Literal["train", "test"]

TEST_SHARE = 8
"""One in so many keys or stories belongs to the test split."""

_DRAWS = 1000  # the chance to miss the test split so often is below 1e-57


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        input_ids: the prompt; with the room kept for the answer it has exactly the length that was asked for.
        answer: what is right.
        answer_ids: the same as tokens that follow the prompt.
        question: text of which the answer may not be taken (BABILong); empty elsewhere.
        queries: (position, token that comes next) where answers are read off the prompt itself and not generated.
    """

    input_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...] = ()
    question: str = ""
    queries: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Reply:
    """What a model generated."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Desk:
    """Where examples of one length are written.

    Attributes:
        tokenizer: the teacher's, which is the student's.
        length: tokens of the prompt and of the room for its answer.
        split: which keys and stories may be hidden.
        prose: sentences for haystacks of prose.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    split: Split = "test"
    prose: Sequence[str] = ()
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece, without special tokens; each distinct piece is tokenised once."""
        if text not in self._known:
            self._known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]

    def opening(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts in front of a text."""
        return opening(self.tokenizer)

    def units(self, before: str, sentences: Sequence[str], first: int, room: int) -> list[tuple[int, ...]]:
        """Sentences that fill `room` tokens exactly, from number `first` on, round and round; the last one is cut."""
        return cut_to((self.encode(before + sentence) for sentence in islice(cycle(sentences), first, None)), room)

    def room(self, used: int, answer_tokens: int, task: str) -> int:
        """Tokens that are left for the haystack.

        Raises:
            DataError: none are left.
        """
        left = self.length - used - answer_tokens
        if left < 0:
            raise DataError(
                f"{self.length:,} tokens are too few; the question and its answer alone take {used + answer_tokens:,}",
                place=f"recall task {task}",
                remedy="Choose a longer one.",
            )
        return left

    def draw(self, make: Callable[[], str]) -> str:
        """A value of `make` that belongs to this desk's split."""
        for _ in range(_DRAWS):
            value = make()
            if split_of(value) == self.split:
                return value
        raise AssertionError(f"none of {_DRAWS} values belongs to the {self.split} split")


def split_of(value: str) -> Split:
    """The split that a hidden value belongs to."""
    return "test" if zlib.crc32(value.encode()) % TEST_SHARE == 0 else "train"


def opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts in front of a text, such as Llama's <|begin_of_text|>."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def cut_to(units: Iterable[Sequence[int]], room: int) -> list[tuple[int, ...]]:
    """The first units, the last of them cut, so that they fill `room` tokens exactly."""
    found: list[tuple[int, ...]] = []
    for unit in units:
        if room <= 0:
            break
        found.append(tuple(unit[:room]))
        room -= len(found[-1])
    assert room <= 0, "too few units"
    return found


def sentences_of(text: str) -> list[str]:
    """Sentences of 20 to 400 characters, whitespace normalised."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if 20 <= len(sentence) <= 400]


@dataclass(frozen=True)
class RecallTask:
    """A task.

    Attributes:
        write: makes an example; the last argument is the depth of the needle, 0 to 1.
        correct: whether a reply is right; None where answers are read off the prompt (`Example.queries`).
        answer_tokens: room that is kept for the answer.
        has_depth: the depth says where the needle lies; tasks without one are drawn at random.
        needs_prose: the haystack is prose, so that scores depend on the text.
    """

    write: Callable[[Desk, random.Random, float], Example]
    correct: Callable[[Reply, Example], bool] | None
    answer_tokens: int
    has_depth: bool = True
    needs_prose: bool = False
