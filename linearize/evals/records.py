"""What evaluations write: one JSON file a kind in `OUT/evals/`, and the rows it holds. The report reads nothing else.

A row names the model it is about: `teacher`, `student`, or the student with a branch changed, as in `BRANCHES`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from linearize.config import Config
from linearize.errors import RunError
from linearize.run_folder import write_json

FOLDER = "evals"
BRANCHES = ("student, linear branch off", "student, window off", "window and sinks alone")
"""Models of the branch probe beside `teacher` and `student`."""


class PerplexityRow(Config):
    """One model on one source in windows of one length; `nll` in nats a token, with its standard error."""

    model: str
    source: str
    length: int
    tokens: int
    nll: float
    standard_error: float | None
    beyond_positions: bool = Field(False, description="longer than the positions the teacher was trained for")


class PositionRow(Config):
    """Mean nll of the tokens at positions start .. stop - 1 of windows of one length."""

    model: str
    source: str
    length: int
    start: int
    stop: int
    tokens: int
    nll: float
    standard_error: float | None = None
    log_ratio: float | None = Field(None, description="nll - the teacher's, on the same windows")
    log_ratio_error: float | None = Field(None, description="standard error of log_ratio, over windows")


class RecallRow(Config):
    """Retrieval from a context of `length` tokens; `depth` is the place of the needle, 0 the beginning, 1 the end."""

    model: str
    task: str
    length: int
    depth: float | None
    count: int
    correct: int
    beyond_positions: bool = Field(False, description="longer than the positions the teacher was trained for")


class TaskRow(Config):
    """Zero-shot scores; errors are standard errors, `chance` the accuracy of guessing."""

    model: str
    task: str
    count: int
    accuracy: float
    accuracy_error: float
    accuracy_norm: float | None = None
    accuracy_norm_error: float | None = None
    perplexity: float | None = None
    chance: float | None = None
    scorer: str = Field("linearize", description="what scored it: linearize or lm-eval")
    recovered: float | None = Field(None, description="accuracy / the teacher's")
    recovered_above_chance: float | None = Field(None, description="the same with chance taken off both")
    paired_p: float | None = Field(None, description="McNemar's exact test against the teacher, two-sided")


class DiagnosticRow(Config):
    """What one layer does: of one head, or of all (None); of queries in one range of positions, or of all (None)."""

    layer: int
    head: int | None
    start: int | None
    stop: int | None
    measure: Literal["teacher_entropy", "student_entropy", "monotonicity", "attention_kl", "relative_error"]
    value: float


class SpeedRow(Config):
    """One model at one length. Prefill reads `length` tokens; decode adds one token to a context of `length`.

    `seconds` is the median: of a whole prefill with its first token, or of one decoding step. A length that did not fit
    has `out_of_memory` and no numbers. Peak memory holds the weights, and is known on GPUs only.
    """

    model: str
    mode: Literal["prefill", "decode"]
    length: int
    batch: int
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    state_bytes: int | None
    dtype: str
    attention: str
    cuda_graph: bool
    out_of_memory: bool = False
    runs: int | None = Field(None, description="timings that the median is of, after the warm-up")
    note: str = ""


ROWS: dict[str, type[Config]] = {
    "perplexity": PerplexityRow,
    "positions": PositionRow,
    "recall": RecallRow,
    "tasks": TaskRow,
    "diagnostics": DiagnosticRow,
    "speed": SpeedRow,
}


class Made(Config):
    """How the rows came about: enough to repeat them."""

    date: str = Field(description="ISO 8601, with the zone")
    device: str
    command: str
    seed: int | None = None
    versions: dict[str, str]


def make_folder(out: Path, name: str = FOLDER) -> Path:
    """The folder of rows, made before anything is measured for it.

    Raises:
        RunError: it cannot be made or written.
    """
    folder = out / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        raise RunError(problem, place=str(out), remedy="Choose another folder for the results.") from None
    return folder


def write_rows(folder: Path, kind: str, rows: Sequence[Config], made: Made) -> Path:
    """Write `folder/evals/<kind>.json`, whole or not at all; returns its path."""
    assert all(type(row) is ROWS[kind] for row in rows), kind
    path = folder / FOLDER / f"{kind}.json"
    write_json(path, {"made": made.model_dump(), "rows": [row.model_dump() for row in rows]})
    return path


def read_rows(folder: Path, kind: str) -> tuple[list[Config], Made] | None:
    """The rows of a kind, or None where it was not measured.

    Raises:
        RunError: the file is no such file.
    """
    path = folder / FOLDER / f"{kind}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [ROWS[kind](**row) for row in found["rows"]], Made(**found["made"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunError(f"cannot be read: {error}", place=str(path), remedy="Measure again.") from None
