"""`linearize eval`: perplexity of a student and its teacher on the same text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import linearize.modeling  # noqa: F401 - registers the classes
from linearize.config import parse_count
from linearize.data import heldout_from
from linearize.errors import DataError, RunError
from linearize.evals.perplexity import perplexity_table
from linearize.export import load_student
from linearize.machine import choose_machine
from linearize.teacher import load_teacher


def teacher_of(folder: str | Path) -> str:
    """What the student in `folder` was converted from, as its metrics.json says.

    Raises:
        RunError: when it does not say.
    """
    path = Path(folder) / "metrics.json"
    remedy = "Name the teacher with --teacher, or leave it out with --no-teacher."
    if not path.is_file():
        raise RunError("does not exist, so the teacher is unknown", place=str(path), remedy=remedy)
    model = json.loads(path.read_text(encoding="utf-8")).get("model")
    if not isinstance(model, str):
        raise RunError("does not name the teacher's `model`", place=str(path), remedy=remedy)
    return model


def parse_lengths(text: str) -> list[int]:
    """Window lengths such as `512,1024,4k`.

    Raises:
        DataError: for anything that is no number of at least 2.
    """
    try:
        lengths = [int(parse_count(part)) for part in text.split(",")]
    except ValueError as error:
        raise DataError(str(error), place="--lengths", remedy="Example: 512,1024,4096.") from None
    if min(lengths) < 2:
        raise DataError(f"a window of {min(lengths)} tokens predicts nothing", place="--lengths")
    return lengths


def evaluate_folder(
    folder: str | Path,
    text: str,
    lengths: Sequence[int],
    *,
    max_tokens: int = 32_768,
    teacher: str | None = None,
    text_field: str | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Perplexity by source and length, on windows that start without context.

    Args:
        folder: the student.
        text: a file or folder of text, as `--data` takes them.
        lengths: window lengths in tokens.
        max_tokens: read per source and length.
        teacher: what `--model` takes; None leaves the teacher out.

    Returns:
        Rows as `perplexity_table` makes them.
    """
    machine = choose_machine(device, "auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = heldout_from(text, text_field, tokenizer, max(max_tokens, max(lengths)))

    @contextmanager
    def student_opened() -> Iterator[PreTrainedModel]:
        yield load_student(folder, dtype=machine.dtype, device=str(machine.device))

    @contextmanager
    def teacher_opened() -> Iterator[PreTrainedModel]:
        assert teacher is not None
        yield load_teacher(teacher, dtype=machine.dtype, device=machine.device).model

    models: Mapping[str, Callable[[], AbstractContextManager[PreTrainedModel]]] = (
        {"student": student_opened} if teacher is None else {"teacher": teacher_opened, "student": student_opened}
    )
    with torch.no_grad():
        return perplexity_table(models, heldout, lengths, max_tokens=max_tokens)
