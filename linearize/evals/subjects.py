"""The models that are measured: teacher, student, and, for the branch probe, what a branch of a hybrid is worth.

Each is opened when its first cell is measured and closed before the next: one model is in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from linearize.attention import StudentAttention
from linearize.errors import LinearizeError, RunError
from linearize.evals.records import BRANCHES
from linearize.export import load_student, load_student_config
from linearize.fingerprint import fingerprint_of
from linearize.machine import Machine
from linearize.mixers import MixerConfig, mixer_config
from linearize.mixers.base import Branch, silenced
from linearize.mixers.swa import SwaConfig
from linearize.surgery import graft, plan_surgery
from linearize.teacher import load_teacher
from linearize.teacher_files import Checkpoint, find_checkpoint, split_revision

TEACHER, STUDENT = "teacher", "student"

WEIGHTS = ("*.safetensors", "*.bin")
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of a model's folder that decide what it computes, and how its tokens are read."""


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: as rows name it.
        identity: what a cell must share with it to be its own: the weights, and what is changed of them.
        open: makes a context in which the model is loaded.
    """

    name: str
    identity: str
    open: Callable[[], AbstractContextManager[PreTrainedModel]]


@contextmanager
def lazily(subject: Subject) -> Iterator[Callable[[], PreTrainedModel]]:
    """A function that loads the model when it is first called; unloaded when the block ends."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(subject.open()))


def find_subjects(folder: str, teacher: str | None, machine: Machine, *, probe: bool) -> list[Subject]:
    """Teacher (unless None) and student, and the three models of the branch probe.

    The baseline `window and sinks alone` is the teacher with the student's window and 4 sink tokens in every layer that
    the student replaces, untrained (arXiv 2309.17453); without a teacher it is left out.

    Raises:
        RunError: a probe of a student that has no window beside a linear branch.
        TeacherError: the teacher cannot be found or fetched.
    """
    student = Subject(STUDENT, identity_of(folder), partial(_student, folder, machine, None))
    found = [student]
    checkpoint = None if teacher is None else find_checkpoint(teacher)  # once: a Hub out of reach takes its time
    known = "" if checkpoint is None else f"{teacher} {fingerprint_of(checkpoint)}"
    if checkpoint is not None:
        found.insert(0, Subject(TEACHER, known, partial(_teacher, checkpoint, machine)))
    if not probe:
        return found
    mixer, layers = surgery_of(folder)
    if not mixer.window_beside_linear:
        raise RunError(
            f"its {mixer.kind} layers have no window beside a linear branch, so there is nothing to switch off",
            place=folder,
            remedy="Leave out --probe.",
        )
    branches: tuple[tuple[str, Branch], ...] = ((BRANCHES[0], "linear"), (BRANCHES[1], "window"))
    for name, branch in branches:
        opened = partial(_student, folder, machine, branch)
        found.append(Subject(name, f"{student.identity} without {branch}", opened))
    if checkpoint is not None:
        swa = SwaConfig(window=mixer.window_beside_linear)
        identity = f"{known} {swa.model_dump_json()} in {layers}"
        found.append(Subject(BRANCHES[2], identity, partial(_windowed, checkpoint, machine, swa, layers)))
    return found


def surgery_of(folder: str) -> tuple[MixerConfig, tuple[int, ...]]:
    """The mixer of a student on disk, and the layers it stands in.

    Raises:
        RunError: for a folder without a student.
    """
    entry: dict[str, Any] | None = load_student_config(folder).to_dict().get("linearize")
    if entry is None:
        raise RunError("holds no student: its config.json has no `linearize` entry", place=folder)
    try:
        return mixer_config(entry["mixer"]), tuple(entry["layers"])
    except LinearizeError as error:
        raise RunError(error.problem, place=f"{folder}, {error.place}", remedy=error.remedy) from None


def identity_of(student: str) -> str:
    """A local student by its weight files' sizes and times and by what its small files say; the Hub's by its commit."""
    path = Path(student)
    if not path.exists():
        return f"{student} {_cached_commit(student)}"
    files = sorted(file for form in WEIGHTS for file in path.glob(form))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    said = [(path / small).read_bytes() for small in SMALL if (path / small).is_file()]
    return f"{student} {stats} {hashlib.sha256(b'|'.join(said)).hexdigest()[:16]}"


def _cached_commit(student: str) -> str | None:
    """The commit of a student from the Hub; `surgery_of` has fetched its config."""
    name, revision = split_revision(student)
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


@contextmanager
def _teacher(checkpoint: Checkpoint, machine: Machine) -> Iterator[PreTrainedModel]:
    yield load_teacher(checkpoint, dtype=machine.dtype, device=machine.device).model


@contextmanager
def _student(folder: str, machine: Machine, branch: Branch | None) -> Iterator[PreTrainedModel]:
    model = load_student(folder, dtype=machine.dtype, device=str(machine.device))
    mixers = [module.mixer for module in model.modules() if isinstance(module, StudentAttention)]
    with ExitStack() as stack:
        if branch is not None:
            stack.enter_context(silenced(mixers, branch))
        yield model


@contextmanager
def _windowed(
    checkpoint: Checkpoint, machine: Machine, swa: SwaConfig, layers: tuple[int, ...]
) -> Iterator[PreTrainedModel]:
    model = load_teacher(checkpoint, dtype=machine.dtype, device=machine.device).model
    count: int = model.config.num_hidden_layers
    kept = tuple(index for index in range(count) if index not in layers)
    graft(model, plan_surgery(model, swa, kept, replace_sliding=True))  # the student's layers, whatever they were
    yield model.eval()
