"""Recall of tokens that mean nothing: multi-query associative recall, and copying."""

from __future__ import annotations

import random

from linearize.evals.recall.base import Desk, Example, RecallTask, Reply, cut_to
from linearize.evals.recall.words import ADJECTIVES, NOUNS

VOCABULARY = 8192
"""Token ids that keys (the lower half) and values (the upper half) are drawn from."""

PAIRS = {64: 4, 128: 8, 256: 16, 512: 64}
"""Key-value pairs by length, as swept in arXiv 2312.04927; a longer text has as many as the longest."""

POWER = 0.01
"""Queries come soon after the pairs: slot g is drawn with a weight of POWER * (g + 1)^(POWER - 1)."""

SHOWN, ASKED = 8, 4
"""Words of the copy that stand in the prompt, and that the model has to go on with."""


def mqar(desk: Desk, draw: random.Random, _depth: float) -> Example:
    """Multi-query associative recall (arXiv 2312.04927): pairs, then every key once more, amid random tokens.

    The answer to a repeated key is its value as the next token. It does not follow in the text, so that all queries
    are answered by one forward pass.
    """
    head = desk.opening()
    desk.room(len(head) + 4 * PAIRS[min(PAIRS)], 0, "mqar")
    length = (desk.length - len(head)) // 2 * 2
    pairs = max((count for least, count in PAIRS.items() if least <= length), default=PAIRS[min(PAIRS)])
    special = set(desk.tokenizer.all_special_ids)
    ids = [token for token in range(1, min(VOCABULARY, len(desk.tokenizer))) if token not in special]
    half = len(ids) // 2

    def drawn() -> str:
        return " ".join(map(str, (*draw.sample(ids[:half], pairs), *draw.sample(ids[half:], pairs))))

    chosen = list(map(int, desk.draw(drawn).split()))
    keys, values = chosen[:pairs], chosen[pairs:]
    text = [token for pair in zip(keys, values, strict=True) for token in pair]
    text += draw.choices(ids, k=length - len(text))
    queries = []
    for key, value, slot in zip(keys, values, _slots(draw, pairs, (length - 2 * pairs) // 2), strict=True):
        place = 2 * pairs + 2 * slot
        text[place] = key
        queries.append((len(head) + place, value))
    return Example((*head, *text), "", queries=tuple(sorted(queries)))


def _slots(draw: random.Random, count: int, space: int) -> list[int]:
    """`count` different slots, drawn one after the other by weight: the earliest of exponential arrival times."""
    arrivals = [draw.expovariate(POWER * (slot + 1) ** (POWER - 1)) for slot in range(space)]
    return sorted(range(space), key=arrivals.__getitem__)[:count]


def copying(desk: Desk, draw: random.Random, depth: float) -> Example:
    """Random words; at the end 8 of them, from the place `depth`, come again, and 4 more have to follow. Ours."""
    words = (*ADJECTIVES, *NOUNS)
    head = (*desk.opening(), *desk.encode("Words, and then some of them again:"))
    passage = desk.draw(lambda: " ".join(draw.choice(words) for _ in range(SHOWN + ASKED))).split()
    span = [desk.encode(" " + word) for word in passage]
    flat = [token for unit in span for token in unit]
    shown = [token for unit in span[:SHOWN] for token in unit]
    tail = (*desk.encode("\nAgain:"), *shown)
    room = desk.room(len(head) + len(flat) + len(tail), COPY.answer_tokens, "copy")
    hay = cut_to((desk.encode(" " + draw.choice(words)) for _ in range(room)), room)
    hay.insert(round(depth * len(hay)), tuple(flat))
    prompt = (*head, *(token for unit in hay for token in unit), *tail)
    return Example(prompt, " ".join(passage[SHOWN:]), tuple(flat[len(shown) :]))


def same_tokens(reply: Reply, example: Example) -> bool:
    """The greedy tokens are the answer's."""
    return reply.ids[: len(example.answer_ids)] == example.answer_ids


MQAR = RecallTask(mqar, None, answer_tokens=0, has_depth=False)
COPY = RecallTask(copying, same_tokens, answer_tokens=48)
