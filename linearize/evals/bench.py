"""What the measurements of one command share: what is wanted, the machine, the text, and the cells measured before."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.data import heldout_from, open_documents
from linearize.doctor import PASSAGE
from linearize.evals.cells import Cells
from linearize.evals.recall import sentences_of
from linearize.evals.subjects import Subject
from linearize.machine import Machine, versions
from linearize_kernels.backend import VARIABLE

PROSE_CHARACTERS = 2_000_000
"""Of the text, for haystacks of prose."""

ModelOf = Callable[[], PreTrainedModel]
"""Loads the model when it is first called."""


def prose_of(text: str | None, text_field: str | None) -> list[str]:
    """Sentences of the first PROSE_CHARACTERS of a text; without one, of a passage that comes with linearize."""
    if text is None:
        return sentences_of(PASSAGE)
    found: list[str] = []
    size = 0
    for _, content in open_documents(text, text_field):
        spelt = content if isinstance(content, str) else "\n".join(message.content for message in content)
        found += sentences_of(spelt[: PROSE_CHARACTERS - size])
        size += len(spelt)
        if size >= PROSE_CHARACTERS:
            break
    return found or sentences_of(PASSAGE)


@dataclass(frozen=True)
class Wanted:
    """What to evaluate: the options of `linearize eval`.

    Attributes:
        folder: the student.
        teacher: what `--model` takes; None leaves the teacher out.
        out: rows go to `out/evals`.
        text: measures perplexity; its sentences make haystacks of prose.
        lengths: of windows and of recall.
        max_tokens: read per source and length.
        recall, tasks: names; empty = none. With `tasks_dir`, `tasks` names local files, and empty means all of them.
        limit: documents a task.
        scorer: "linearize" or "lm-eval", for local tasks.
    """

    folder: str
    teacher: str | None
    out: Path
    text: str | None = None
    text_field: str | None = None
    lengths: tuple[int, ...] = (512, 1024)
    max_tokens: int = 32_768
    positions: bool = False
    recall: tuple[str, ...] = ()
    depths: int = 5
    samples: int = 10
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    limit: int | None = None
    scorer: str = "linearize"
    diagnostics: bool = False
    probe: bool = False
    seed: int = 0
    device: str | None = None
    command: str = ""


@dataclass
class Bench:
    """What the measurements of one command share."""

    wanted: Wanted
    machine: Machine
    tokenizer: PreTrainedTokenizerBase
    cells: Cells
    say: Callable[[str], None]
    positions: int | None = None  # that the teacher was trained for

    @cached_property
    def heldout(self) -> dict[str, np.ndarray]:
        """Tokens by source."""
        wanted = self.wanted
        if wanted.text is None:
            return {}
        return heldout_from(wanted.text, wanted.text_field, self.tokenizer, wanted.max_tokens)

    @cached_property
    def prose(self) -> list[str]:
        """Sentences of the text, or of a passage that comes with linearize."""
        return prose_of(self.wanted.text, self.wanted.text_field)

    def beyond(self, length: int) -> bool:
        """Longer than the teacher's positions."""
        return self.positions is not None and length > self.positions

    def once(self, subject: Subject, what: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """A cell of that subject on this machine, in these libraries: rows that are written say all of it."""
        on = [self.machine.name, self.machine.precision, os.environ.get(VARIABLE, "")]
        key = {"model": subject.identity, "on": on, "with": versions(), **what}
        return self.cells.once(key, measure)
