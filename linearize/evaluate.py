"""`linearize eval`: a student beside its teacher, by everything that evals/ measures, cell by cell.

A cell is a model, a task and a length. Finished cells are kept in OUT/evals/cells, so that a command that was
interrupted, or that asks for more, measures only what is missing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import linearize.modeling  # noqa: F401 - registers the classes
from linearize.config import Config, parse_count
from linearize.doctor import PASSAGE
from linearize.errors import DataError, RunError
from linearize.evals.bench import Bench, ModelOf, Wanted
from linearize.evals.cells import Cells
from linearize.evals.diagnostics import TOKENS as DIAGNOSTIC_TOKENS
from linearize.evals.diagnostics import diagnose, pair
from linearize.evals.positions import WindowLosses, perplexity_row, position_rows, window_losses
from linearize.evals.recall import MARKING, Answered, Questions, ask, check_questions, find_tasks
from linearize.evals.records import DiagnosticRow, Made, RecallRow, TaskRow, write_rows
from linearize.evals.subjects import STUDENT, TEACHER, Subject, find_subjects, lazily, surgery_of
from linearize.evals.tasks.compare import compared
from linearize.evals.tasks.harness import check_installed, run_local, run_named
from linearize.evals.tasks.rows import LocalTask, read_tasks
from linearize.evals.tasks.score import Scores, score, task_row
from linearize.export import load_student_config, load_student_tokenizer, refuse_no_student
from linearize.fingerprint import pinned
from linearize.machine import choose_machine, versions
from linearize.reach import last_position
from linearize.run_folder import read_json

Found = dict[str, list[Config]]
"""Rows by kind."""


def teacher_of(folder: str | Path) -> str:
    """What the student in `folder` was converted from, as its metrics.json says: the very commit, or the wheel.

    Raises:
        RunError: when it does not say, or is no student.
    """
    refuse_no_student(folder)
    path = Path(folder) / "metrics.json"
    remedy = "Name the teacher with --teacher, or leave it out with --no-teacher."
    if not path.is_file():
        raise RunError("does not exist, so the teacher is unknown", place=str(path), remedy=remedy)
    metrics = read_json(path)
    model = metrics.get("model")
    if not isinstance(model, str):
        raise RunError("does not name the teacher's `model`", place=str(path), remedy=remedy)
    return pinned(model, metrics.get("teacher", {}))


def parse_lengths(text: str) -> list[int]:
    """Window lengths such as `512,1024,4k`; of a length, unlike of a budget, 4k is 4,096.

    Raises:
        DataError: for anything that is no number of at least 2.
    """
    try:
        lengths = [_length(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise DataError(str(error), place="--lengths", remedy="Example: 512,1024,4096.") from None
    if min(lengths) < 2:
        raise DataError(f"a window of {min(lengths)} tokens predicts nothing", place="--lengths")
    return lengths


def _length(text: str) -> int:
    return 1024 * int(text[:-1]) if text[:-1].isdecimal() and text[-1] in "kK" else int(parse_count(text))


def is_hybrid(folder: str) -> bool:
    """Whether the student has a window beside a linear branch, so that it can be probed."""
    return bool(surgery_of(folder)[0].window_beside_linear)


def evaluate(wanted: Wanted, say: Callable[[str], None]) -> Found:
    """Measure everything that is wanted, and write it to `wanted.out`/evals.

    Args:
        wanted: what to measure.
        say: told of each cell as it is done.

    Raises:
        LinearizeError: for all that the user can mend.
    """
    bench, local = _prepare(wanted, say)
    subjects = find_subjects(wanted.folder, wanted.teacher, bench.machine, probe=wanted.probe)
    losses: dict[tuple[str, str, int], WindowLosses] = {}
    scores: dict[tuple[str, str], Scores] = {}
    recall: list[Config] = []
    with torch.no_grad():
        for subject in subjects:
            with lazily(subject) as model_of:
                losses |= dict(_losses(bench, subject, model_of))
                recall += _recall(bench, subject, model_of)
                if subject.name in (TEACHER, STUDENT):
                    scores |= dict(_local_scores(bench, subject, model_of, local))
                    scores |= dict(_named_scores(bench, subject, model_of))
    found: Found = {
        "perplexity": [
            perplexity_row(name, source, one, beyond=bench.beyond(length))
            for (name, source, length), one in losses.items()
        ],
        "positions": list(_position_rows(losses)) if wanted.positions else [],
        "recall": recall,
        "tasks": list(_task_rows(bench, scores)),
        "diagnostics": list(_diagnostics(bench, subjects)) if wanted.diagnostics else [],
    }
    made = Made(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=bench.machine.name,
        command=wanted.command,
        seed=wanted.seed,
        versions=versions(),
    )
    for kind, rows in found.items():
        if rows:
            write_rows(wanted.out, kind, rows, made)
    return found


def _prepare(wanted: Wanted, say: Callable[[str], None]) -> tuple[Bench, list[LocalTask]]:
    """Find out early what cannot work."""
    find_tasks(wanted.recall)
    if wanted.positions and wanted.text is None:
        raise DataError("needs text", place="--positions", remedy="Give it with --text.")
    if (wanted.tasks and wanted.tasks_dir is None) or wanted.scorer == "lm-eval":
        check_installed()
    local = [] if wanted.tasks_dir is None else read_tasks(wanted.tasks_dir, wanted.tasks or None, wanted.limit)
    surgery_of(wanted.folder)  # says what is wrong with the folder before a teacher is loaded
    if wanted.out == Path(wanted.folder) and not wanted.out.is_dir():
        raise RunError("is no local folder", place=wanted.folder, remedy="Say with --out where the rows go.")
    config = load_student_config(wanted.folder)
    _check_positions(wanted, last_position(config))
    positions: int = config.max_position_embeddings
    tokenizer = load_student_tokenizer(wanted.folder)
    machine = choose_machine(wanted.device, "auto")
    bench = Bench(wanted, machine, tokenizer, Cells(wanted.out), say, positions)
    longest = max((tokens.size for tokens in bench.heldout.values()), default=0)
    if wanted.text is not None and longest < min(wanted.lengths):
        raise DataError(
            f"no source has one window of {min(wanted.lengths):,} tokens; the longest has {longest:,}.",
            place="perplexity",
            remedy="Give more held-out text, allow more tokens or choose shorter windows.",
        )
    shortest = Questions(length=min(wanted.lengths), depths=wanted.depths, samples=1, seed=wanted.seed)
    check_questions(tokenizer, find_tasks(wanted.recall), shortest, bench.prose)
    far = [length for length in wanted.lengths if bench.beyond(length)]
    if far and (wanted.recall or wanted.text is not None):
        named = ", ".join(f"{length:,}" for length in far)
        say(f"Lengths {named} are beyond the {positions:,} positions that the teacher was trained for.")
    return bench, local


def _check_positions(wanted: Wanted, last: int | None) -> None:
    """Refuse lengths that a family with a table of positions cannot read at all.

    Raises:
        DataError: naming them.
    """
    wrong = [f"{length:,}" for length in wanted.lengths if last is not None and length > last]
    if wrong and (wanted.recall or wanted.text is not None):
        raise DataError(
            f"{', '.join(wrong)} tokens: the model has learned {last:,} positions and can read no more",
            place="--lengths",
            remedy="Choose shorter ones.",
        )


def _losses(bench: Bench, subject: Subject, model_of: ModelOf) -> Iterator[tuple[tuple[str, str, int], WindowLosses]]:
    """Of every source and length that fills a window."""
    most = bench.wanted.max_tokens
    for source, tokens in bench.heldout.items():
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
        for length in bench.wanted.lengths:
            if tokens.size < length:
                continue

            def measure(tokens: np.ndarray = tokens, length: int = length) -> Any:
                return window_losses(model_of(), tokens, length=length, max_tokens=most).model_dump()

            what = {"kind": "perplexity", "text": digest, "length": length, "max_tokens": most}
            found = WindowLosses(**bench.once(subject, what, measure))
            bench.say(f"{subject.name}: perplexity of {source}, {length:,} tokens: {math.exp(found.mean):,.2f}")
            yield (subject.name, source, length), found


def _position_rows(losses: dict[tuple[str, str, int], WindowLosses]) -> Iterator[Config]:
    for (name, source, length), found in losses.items():
        teacher = None if name == TEACHER else losses.get((TEACHER, source, length))
        yield from position_rows(name, source, found, teacher)


def _recall(bench: Bench, subject: Subject, model_of: ModelOf) -> Iterator[RecallRow]:
    wanted = bench.wanted
    for name, task in find_tasks(wanted.recall).items():
        for length in wanted.lengths:
            questions = Questions(length=length, depths=wanted.depths, samples=wanted.samples, seed=wanted.seed)

            def measure(name: str = name, questions: Questions = questions) -> Any:
                found = ask(model_of(), bench.tokenizer, name, questions, bench.prose)
                return [answered.model_dump() for answered in found]

            prose = hashlib.sha256("\n".join(bench.prose).encode()).hexdigest()[:16] if task.needs_prose else None
            what = {"kind": "recall", "task": name, "marking": MARKING, "prose": prose, **questions.model_dump()}
            answers = [Answered(**answered) for answered in bench.once(subject, what, measure)]
            right, count = sum(one.correct for one in answers), sum(one.count for one in answers)
            bench.say(f"{subject.name}: {name}, {length:,} tokens: {right} of {count}")
            for one in answers:
                yield RecallRow(
                    model=subject.name,
                    task=name,
                    length=length,
                    beyond_positions=bench.beyond(length),
                    **one.model_dump(),
                )


def _local_scores(
    bench: Bench, subject: Subject, model_of: ModelOf, tasks: Sequence[LocalTask]
) -> Iterator[tuple[tuple[str, str], Scores]]:
    scorer = bench.wanted.scorer
    for task in tasks:

        def measure(task: LocalTask = task) -> Any:
            if scorer == "lm-eval":
                return run_local(model_of(), bench.tokenizer, task).model_dump()
            return score(model_of(), bench.tokenizer, task).model_dump()

        what = {"kind": "tasks", "task": task.name, "rows": task.fingerprint, "scorer": scorer}
        yield (subject.name, task.name), _said(bench, subject, task.name, bench.once(subject, what, measure))


def _named_scores(bench: Bench, subject: Subject, model_of: ModelOf) -> Iterator[tuple[tuple[str, str], Scores]]:
    wanted = bench.wanted
    for name in wanted.tasks if wanted.tasks_dir is None else ():

        def measure(name: str = name) -> Any:
            found = run_named(model_of(), bench.tokenizer, name, wanted.limit)
            return {task: one.model_dump() for task, one in found.items()}

        what = {"kind": "tasks", "task": name, "limit": wanted.limit, "scorer": "lm-eval"}
        for task, one in bench.once(subject, what, measure).items():
            yield (subject.name, task), _said(bench, subject, task, one)


def _said(bench: Bench, subject: Subject, task: str, found: Any) -> Scores:
    one = Scores(**found)
    bench.say(f"{subject.name}: {task}: {sum(one.correct)} of {len(one.correct)}")
    return one


def _task_rows(bench: Bench, scores: dict[tuple[str, str], Scores]) -> Iterator[TaskRow]:
    """Rows, the student's with what it recovers of its teacher."""
    local = bench.wanted.tasks_dir is not None and bench.wanted.scorer == "linearize"
    rows = {key: task_row(*key, one, "linearize" if local else "lm-eval") for key, one in scores.items()}
    for (name, task), row in rows.items():
        teacher = (TEACHER, task)
        if name == TEACHER or teacher not in rows:
            yield row
        else:
            yield compared(row, rows[teacher], scores[name, task].correct, scores[teacher].correct)


def _diagnostics(bench: Bench, subjects: Sequence[Subject]) -> Iterator[DiagnosticRow]:
    """Of the student and its teacher on the first source of the text, or on a passage that comes with linearize.

    Raises:
        RunError: without a teacher.
    """
    by_name = {subject.name: subject for subject in subjects}
    if TEACHER not in by_name:
        raise RunError("compares a student with its teacher", place="--diagnostics", remedy="Leave out --no-teacher.")
    teacher, student = by_name[TEACHER], by_name[STUDENT]
    if bench.heldout:
        ids = next(iter(bench.heldout.values()))[:DIAGNOSTIC_TOKENS].tolist()
    else:
        ids = bench.tokenizer(PASSAGE, add_special_tokens=False)["input_ids"][:DIAGNOSTIC_TOKENS]

    def measure() -> Any:
        with lazily(teacher) as teacher_of_it, lazily(student) as student_of_it:
            grafted = pair(student_of_it(), teacher_of_it())
            return [row.model_dump() for row in diagnose(grafted, torch.tensor(ids, dtype=torch.long)[None])]

    digest = hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
    what = {"kind": "diagnostics", "teacher": teacher.identity, "text": digest}
    for row in bench.once(student, what, measure):
        yield DiagnosticRow(**row)
