"""Facts of a small world, hidden among sentences of prose, and a question that needs one to three of them.

After BABILong (arXiv 2406.10149), whose facts are those of bAbI (arXiv 1502.05698): the world, the five questions, the
placement of the facts and the scoring follow them, while the facts come from a generator of our own and the prose is
the user's. Scores are therefore "-like" and are not to be compared with published ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from linearize.evals.recall.base import Desk, Example, RecallTask, Reply

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
GIVERS = ("Mary", "Bill", "Fred", "Jeff")
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}
MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TAKES = ("got", "took", "grabbed", "picked up")
DROPS = ("dropped", "put down", "left", "discarded")
GIVES = ("gave", "handed", "passed")

NAMES = frozenset(word.lower() for word in (*ROOMS, *OBJECTS, *PEOPLE, *GIVERS))
"""Prose that holds one of these words is not used as background."""

ANSWER_TOKENS = 16
_SHORTEST = 10  # tokens of a background sentence, as published


@dataclass(frozen=True)
class Story:
    """Facts in their order, a question and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclass
class World:
    """Who is where and holds what; it tells each event as a fact."""

    draw: random.Random
    people: tuple[str, ...] = PEOPLE
    facts: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)  # of people, and of objects that nobody holds
    holder: dict[str, str] = field(default_factory=dict)
    trail: dict[str, list[str]] = field(default_factory=dict)  # rooms an object has been in, each once in a row

    def move(self) -> None:
        """Somebody goes to another room, with what he holds."""
        person = self.draw.choice(self.people)
        room = self.draw.choice([room for room in ROOMS if room != self.place.get(person)])
        self.place[person] = room
        self.facts.append(f"{person} {self.draw.choice(MOVES)} the {room}.")
        for thing, holder in self.holder.items():
            if holder == person:
                self._seen(thing, room)

    def take(self) -> bool:
        """Somebody picks up an object that is in his room, or whose place nobody knows yet."""
        pairs = [
            (person, thing)
            for person, room in self.place.items()
            if person in self.people
            for thing in OBJECTS
            if thing not in self.holder and self.place.get(thing, room) == room
        ]
        if not pairs:
            return False
        person, thing = self.draw.choice(pairs)
        self.place.pop(thing, None)
        self.holder[thing] = person
        self._seen(thing, self.place[person])
        self.facts.append(f"{person} {self.draw.choice(TAKES)} the {thing} there.")
        return True

    def drop(self) -> bool:
        """Somebody lays an object down."""
        if not self.holder:
            return False
        thing = self.draw.choice(sorted(self.holder))
        person = self.holder.pop(thing)
        self.place[thing] = self.place[person]
        self.facts.append(f"{person} {self.draw.choice(DROPS)} the {thing} there.")
        return True

    def _seen(self, thing: str, room: str) -> None:
        rooms = self.trail.setdefault(thing, [])
        if not rooms or rooms[-1] != room:
            rooms.append(room)

    def carry_on(self) -> None:
        """One event: mostly moves, and what can be done with objects."""
        event = self.draw.choice((self.move, self.move, self.take, self.drop))
        if event() is False:
            self.move()


def where_is_person(draw: random.Random) -> Story:
    """QA1: one supporting fact, the last move of a person; 2 to 10 facts."""
    world = World(draw)
    for _ in range(draw.randint(2, 10)):
        world.move()
    person = draw.choice([person for person in PEOPLE if person in world.place])
    return Story(tuple(world.facts), f"Where is {person}?", world.place[person])


def where_is_object(draw: random.Random) -> Story:
    """QA2: two supporting facts, who has the object or has dropped it, and that person's move; 2 facts or more."""
    world = World(draw)
    count = draw.randint(4, 16)
    while len(world.facts) < count or not world.trail:
        world.carry_on()
    thing = draw.choice(sorted(world.trail))
    return Story(tuple(world.facts), f"Where is the {thing}?", world.trail[thing][-1])


def where_was_object(draw: random.Random) -> Story:
    """QA3: three supporting facts, the room before the object's last one; 4 facts or more."""
    world = World(draw)
    count = draw.randint(6, 24)
    while len(world.facts) < count or not any(len(rooms) > 1 for rooms in world.trail.values()):
        world.carry_on()
    thing = draw.choice(sorted(thing for thing, rooms in world.trail.items() if len(rooms) > 1))
    before, last = world.trail[thing][-2:]
    return Story(tuple(world.facts), f"Where was the {thing} before the {last}?", before)


def what_lies_where(draw: random.Random) -> Story:
    """QA4: two facts around a common room; one of them answers."""
    first, common, second = draw.sample(ROOMS, 3)
    one, other = draw.sample(sorted(DIRECTIONS), 2)
    facts = [f"The {first} is {one} of the {common}.", f"The {second} is {other} of the {common}."]
    draw.shuffle(facts)
    if draw.random() < 0.5:
        return Story(tuple(facts), f"What is {one} of the {common}?", first)
    return Story(tuple(facts), f"What is the {first} {one} of?", common)


def who_gave_what(draw: random.Random) -> Story:
    """QA5: one supporting fact, the latest gift that fits the question; all people are in one room."""
    room = draw.choice(ROOMS)
    world = World(draw, GIVERS)
    for person in draw.sample(GIVERS, len(GIVERS)):
        world.place[person] = room
        world.facts.append(f"{person} {draw.choice(MOVES)} the {room}.")
    gifts: list[tuple[str, str, str]] = []
    count = draw.randint(6, 20)
    while len(world.facts) < count or not gifts:
        if world.holder and draw.random() < 0.6:
            thing = draw.choice(sorted(world.holder))
            giver = world.holder[thing]
            taker = draw.choice([person for person in GIVERS if person != giver])
            world.holder[thing] = taker
            gifts.append((giver, thing, taker))
            world.facts.append(f"{giver} {draw.choice(GIVES)} the {thing} to {taker}.")
        elif not world.take():
            world.drop()
    giver, thing, taker = draw.choice(gifts)
    return Story(tuple(world.facts), *_asked(draw, giver, thing, taker, gifts))


def _asked(
    draw: random.Random, giver: str, thing: str, taker: str, gifts: list[tuple[str, str, str]]
) -> tuple[str, str]:
    """One of five questions that this gift raises, answered by the latest gift that fits it."""
    questions: tuple[tuple[str, Callable[[tuple[str, str, str]], bool], int], ...] = (
        (f"Who gave the {thing} to {taker}?", lambda gift: gift[1:] == (thing, taker), 0),
        (f"Who did {giver} give the {thing} to?", lambda gift: gift[:2] == (giver, thing), 2),
        (f"What did {giver} give to {taker}?", lambda gift: (gift[0], gift[2]) == (giver, taker), 1),
        (f"Who received the {thing}?", lambda gift: gift[1] == thing, 2),
        (f"Who gave the {thing}?", lambda gift: gift[1] == thing, 0),
    )
    question, fits, part = draw.choice(questions)
    return question, [gift for gift in gifts if fits(gift)][-1][part]


_EXAMPLES: dict[int, tuple[Story, Story]] = {
    1: (
        Story(("Daniel went to the office.", "John moved to the garden."), "Where is Daniel?", "office"),
        Story(("Mary went to the hallway.", "Mary moved to the bedroom."), "Where is Mary?", "bedroom"),
    ),
    2: (
        Story(("Mary went to the garden.", "Mary took the milk there."), "Where is the milk?", "garden"),
        Story(
            ("John went to the office.", "John got the apple there.", "John journeyed to the kitchen."),
            "Where is the apple?",
            "kitchen",
        ),
    ),
    3: (
        Story(
            ("Sandra went to the kitchen.", "Sandra got the apple there.", "Sandra moved to the bedroom."),
            "Where was the apple before the bedroom?",
            "kitchen",
        ),
        Story(
            ("John moved to the garden.", "John took the milk there.", "John travelled to the hallway."),
            "Where was the milk before the hallway?",
            "garden",
        ),
    ),
    4: (
        Story(
            ("The garden is west of the office.", "The kitchen is north of the office."),
            "What is north of the office?",
            "kitchen",
        ),
        Story(
            ("The bathroom is east of the hallway.", "The bedroom is south of the hallway."),
            "What is the bathroom east of?",
            "hallway",
        ),
    ),
    5: (
        Story(("Bill took the milk there.", "Bill handed the milk to Fred."), "Who gave the milk to Fred?", "Bill"),
        Story(
            ("Mary got the football there.", "Mary passed the football to Jeff."),
            "What did Mary give to Jeff?",
            "football",
        ),
    ),
}
"""Two worked examples a question."""

_INSTRUCTIONS = {
    1: "Facts about where people are stand hidden between other sentences. The latest fact about a person counts.",
    2: "Facts about where people are and what they carry stand hidden between other sentences. An object is where its "
    "holder is, or where it was put down.",
    3: "Facts about where people are and what they carry stand hidden between other sentences. An object moves with "
    "its holder; say in which room it was before the room that is named.",
    4: "Facts about how rooms lie to each other stand hidden between other sentences.",
    5: "Facts about who gave what to whom stand hidden between other sentences. The latest gift counts.",
}

STORIES: dict[int, Callable[[random.Random], Story]] = {
    1: where_is_person,
    2: where_is_object,
    3: where_was_object,
    4: what_lies_where,
    5: who_gave_what,
}


def babilong(desk: Desk, draw: random.Random, _depth: float, *, question: int) -> Example:
    """The facts at sorted places, drawn uniformly with replacement from all gaps of the background."""
    stories: dict[str, Story] = {}

    def tell() -> str:
        story = STORIES[question](draw)
        text = " ".join((*story.facts, story.question))
        stories[text] = story
        return text

    story = stories[desk.draw(tell)]
    facts = [desk.encode(" " + fact) for fact in story.facts]
    head = (*desk.opening(), *desk.encode(_instruction(question) + "<context>\n"))
    tail = desk.encode(f"\n</context>\n\nQuestion: {story.question}\nAnswer:")
    used = len(head) + len(tail) + sum(map(len, facts))
    room = desk.room(used, ANSWER_TOKENS, f"babilong-{question}-like")
    background = _background(desk)
    units = desk.units(" ", background, draw.randrange(len(background)), room)
    places = sorted(draw.randint(0, len(units)) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        units.insert(place, fact)
    prompt = (*head, *(token for unit in units for token in unit), *tail)
    return Example(prompt, story.answer, desk.encode(f" {story.answer}."), story.question)


def _instruction(question: int) -> str:
    shown = "".join(
        f"<example>\n{' '.join(story.facts)}\nQuestion: {story.question}\nAnswer: {story.answer}.\n</example>\n\n"
        for story in _EXAMPLES[question]
    )
    return f"{_INSTRUCTIONS[question]}\n\n{shown}Answer with one word.\n\n"


def _background(desk: Desk) -> list[str]:
    """Sentences of at least 10 tokens without a name or a room of the facts."""
    return [
        sentence
        for sentence in desk.prose
        if not NAMES & set(re.findall(r"[a-z]+", sentence.lower())) and len(desk.encode(" " + sentence)) >= _SHORTEST
    ]


def one_label(reply: Reply, example: Example, *, labels: tuple[str, ...]) -> bool:
    """Of the labels in the reply's first sentence that the question does not name, there is one: the answer."""
    text = reply.text.lower()
    for mark in ("<context>", "<example>", "question"):
        text = text.split(mark)[0]
    words = set(re.findall(r"[a-z]+", text.split(".")[0]))
    asked = set(re.findall(r"[a-z]+", example.question.lower()))
    return [label for label in map(str.lower, labels) if label in words - asked] == [example.answer.lower()]


def _task(question: int) -> RecallTask:
    labels = (*GIVERS, *OBJECTS) if question == 5 else ROOMS
    return RecallTask(
        partial(babilong, question=question),
        partial(one_label, labels=labels),
        ANSWER_TOKENS,
        has_depth=False,
        needs_prose=True,
    )


BABILONG = {f"babilong-{question}-like": _task(question) for question in STORIES}
