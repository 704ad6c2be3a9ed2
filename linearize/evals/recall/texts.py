"""Recall tasks as training text: each document fills one packed row and ends with the answer.

Published recall of linear students comes from training for it (Lizard, arXiv 2507.09025 section 5.2; LAWCAT, arXiv
2509.18467, by the names of its released settings, its data unverified). What is hidden here no test asks for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from linearize.errors import DataError, RunError
from linearize.evals.recall.base import Desk
from linearize.evals.recall.table import TASKS

_TRIES = 6
_REFUSALS = 100
"""Examples in a row that no haystack brings to the length: the task is not made of text."""


@dataclass(frozen=True)
class RecallTexts:
    """What to write.

    Attributes:
        tasks: names of TASKS; they take turns.
        length: tokens of a document with the end-of-text token behind it, which should be those of a training row.
        tokens: of all documents together, at least.
        seed: of keys, depths and haystacks.
        prose: sentences for haystacks of prose.
    """

    tasks: tuple[str, ...]
    length: int
    tokens: int
    seed: int = 0
    prose: Sequence[str] = ()


def recall_texts(wanted: RecallTexts, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield (task, document), without end; the n-th depends on nothing but the seed, the length and n.

    Raises:
        DataError: the length is too short for a task, or the task is not made of text.
    """
    for name in wanted.tasks:
        if TASKS[name].correct is None:
            raise DataError(
                "its answers are tokens at places of the prompt, not text.",
                place=f"recall task {name}",
                remedy="`linearize.evals.recall.training_rows` gives its tokens and targets.",
            )
    desk = Desk(tokenizer, wanted.length, "train", wanted.prose)
    refused = 0
    for number, name in zip(count(), cycle(wanted.tasks), strict=False):
        text = _fitted(name, f"{name} {wanted.seed} {number}", desk)
        refused = 0 if text is not None else refused + 1
        if refused == _REFUSALS:
            raise DataError("cannot be written as text of an exact length.", place=f"recall task {name}")
        if text is not None:
            yield name, text


def write_recall_texts(
    wanted: RecallTexts, tokenizer: PreTrainedTokenizerBase, out: Path, say: Callable[[str], None]
) -> int:
    """Write a parquet file with the columns `text` and `source`; the number of documents. Whole or not at all.

    Raises:
        DataError: see `recall_texts`; or `out` has another suffix.
        RunError: the file is there already, or cannot be written.
    """
    if out.suffix != ".parquet":
        remedy = "Let its name end in .parquet."
        raise DataError("is a parquet file, and --data goes by its name.", place=f"--out {out}", remedy=remedy)
    if out.exists():
        raise RunError("exists already.", place=str(out), remedy="Choose another --out, or delete it.")
    documents = -(-wanted.tokens // wanted.length)
    rows: list[tuple[str, str]] = []
    for row in recall_texts(wanted, tokenizer):
        rows.append(row)
        if len(rows) % 500 == 0:
            say(f"{len(rows):,} of {documents:,} documents")
        if len(rows) == documents:
            break
    table = pa.table({"text": [text for _, text in rows], "source": [name for name, _ in rows]})
    aside = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, aside)
        os.replace(aside, out)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror or error}.", place=str(out)) from error
    return documents


def _fitted(name: str, place: str, desk: Desk) -> str | None:
    """A document of the desk's length: the haystack grows or shrinks until the text is spelt with that many tokens.

    Tokens of a prompt are put together from pieces, and a tokenizer may join what stands at their seams.
    """
    size = desk.length
    for _ in range(_TRIES):
        draw = random.Random(place)
        depth = draw.random()
        example = TASKS[name].write(replace(desk, length=size), draw, depth)
        ids = [*example.input_ids, *example.answer_ids]
        text = desk.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        missing = desk.length - 1 - len(desk.tokenizer(text, add_special_tokens=False)["input_ids"])
        if missing == 0:
            return str(text)
        size += missing
    return None
