"""Needles in haystacks: the passkey test and the single needles of RULER (arXiv 2404.06654)."""

from __future__ import annotations

import random
import re
import uuid
from functools import partial
from itertools import chain, repeat

from linearize.evals.recall.base import Desk, Example, RecallTask, Reply, cut_to
from linearize.evals.recall.words import ADJECTIVES, FILLER, NOUNS

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
_QUESTION = "What is the pass key? The pass key is"


def passkey(desk: Desk, draw: random.Random, depth: float) -> Example:
    """The passkey test of Landmark attention (arXiv 2305.16300), its filler cut in tokens, theirs in characters.

    Keys have 5 digits, so that they are of one width for tokenizers that join digits.
    """
    key = desk.draw(lambda: str(draw.randint(10_000, 99_999)))
    head = (*desk.opening(), *desk.encode(_TASK + "\n"))
    needle = desk.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    tail = desk.encode("\n" + _QUESTION)
    room = desk.room(len(head) + len(needle) + len(tail), PASSKEY.answer_tokens, "passkey")
    before = round(depth * room)
    prompt = (*head, *_grass(desk, before), *needle, *_grass(desk, room - before), *tail)
    return Example(prompt, key, desk.encode(f" {key}."))


def _grass(desk: Desk, room: int) -> tuple[int, ...]:
    """The first `room` tokens of the endless filler."""
    first, again = desk.encode(" ".join(FILLER)), desk.encode(" " + " ".join(FILLER))
    return tuple(token for unit in cut_to(chain((first,), repeat(again)), room) for token in unit)


def first_number(reply: Reply, example: Example) -> bool:
    """The first whole number of the reply is the key."""
    found = re.search(r"\d+", reply.text)
    return found is not None and found[0] == example.answer


def niah(desk: Desk, draw: random.Random, depth: float, *, prose: bool, value: str) -> Example:
    """A single needle of RULER: `value` is "number" (7 digits) or "uuid"; the haystack is filler lines or prose.

    Whole sentences as in RULER, but for the last of the haystack, which is cut: every prompt has the same length.
    """
    key = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
    secret = desk.draw(partial(_VALUES[value], draw))
    before = " " if prose else "\n"
    head = desk.encode(
        f"A special magic {value} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {value} afterwards." + ("\n" if prose else "")
    )
    needle = desk.encode(f"{before}One of the special magic {value}s for {key} is: {secret}.")
    asked = f"special magic {value} for {key} mentioned in the provided text"
    tail = desk.encode(f"\nWhat is the {asked}? The {asked} is")
    head = (*desk.opening(), *head)
    room = desk.room(len(head) + len(needle) + len(tail), ANSWER_TOKENS[value], "niah")
    sentences = desk.prose if prose else (" ".join(FILLER),)
    first = draw.randrange(len(sentences))
    hay = desk.units(before, sentences, first, room)
    hay.insert(round(depth * max(0, len(hay) - 1)), needle)
    return Example((*head, *(token for unit in hay for token in unit), *tail), secret, desk.encode(f" {secret}."))


def _number(draw: random.Random) -> str:
    return str(draw.randint(10**6, 10**7 - 1))


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


_VALUES = {"number": _number, "uuid": _uuid}


def contained(reply: Reply, example: Example) -> bool:
    """The value is somewhere in the reply, in any case: RULER's string match."""
    return example.answer.lower() in reply.text.lower()


ANSWER_TOKENS = {"number": 24, "uuid": 64}
"""Room for a value whose every character may be a token, and for some words before it."""

PASSKEY = RecallTask(passkey, first_number, answer_tokens=16)
NIAH_1 = RecallTask(partial(niah, prose=False, value="number"), contained, ANSWER_TOKENS["number"])
NIAH_2_LIKE = RecallTask(
    partial(niah, prose=True, value="number"), contained, ANSWER_TOKENS["number"], needs_prose=True
)
NIAH_3_LIKE = RecallTask(partial(niah, prose=True, value="uuid"), contained, ANSWER_TOKENS["uuid"], needs_prose=True)
