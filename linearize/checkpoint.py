"""Save and resume of a run. A checkpoint is whole or absent: written aside, flushed to disk, checked on reading.

One run is one output folder; its checkpoints are `<out>/checkpoints/stage0-step000123/`, each with

    student.safetensors   all student parameters, by name: mixers, adapters, base weights that were trained
    trainer.pt            optimiser state and RNG states; plain tensors and numbers, read with weights_only=True
    state.json            where the run stands (`RunState`)
    manifest.json         sha256 and size of each of these
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearize.config import Config
from linearize.errors import RunError
from linearize.randomness import RngState

log = logging.getLogger(__name__)

STUDENT, TRAINER, STATE, MANIFEST = "student.safetensors", "trainer.pt", "state.json", "manifest.json"
_NAME = re.compile(r"stage(\d+)-step(\d+)")
_TEMPORARY = ".tmp-"
_PACKAGES = ("linearize", "torch", "transformers", "accelerate", "safetensors", "numpy")


class TrainerState(TypedDict):
    """The content of `trainer.pt`. `names` are the trained parameters in the optimiser's order.

    `course` is what the stage's course must know to go on.
    """

    names: list[str]
    optimizer: dict[str, Any]
    rng: RngState
    course: dict[str, Any]


class RunState(Config):
    """Where a run stands: the content of `state.json`.

    `step`, `micro_batches`, `tokens` and `seconds` (training only) count from the start of the stage; `metrics` is the
    last record of the stage in `metrics.jsonl`. `skipped` counts the last steps in a row whose loss or gradient was not
    finite.
    """

    format: Literal[1] = 1
    stage_index: int = Field(ge=0)
    stage_name: str
    step: int = Field(default=0, ge=0)
    steps: int = Field(ge=0)
    micro_batches: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    skipped: int = Field(default=0, ge=0)
    seed: int
    recipe_hash: str
    corpus_fingerprint: str
    device: str
    metrics: dict[str, float | None] = Field(default={})
    versions: dict[str, str] = Field(default={})

    @property
    def finished(self) -> bool:
        """Whether the stage has taken all of its steps."""
        return self.step >= self.steps

    def advanced(
        self, micro_batches: int, tokens: int, seconds: float, metrics: dict[str, float | None], skipped: bool
    ) -> "RunState":
        """The state one step later."""
        return self.model_copy(
            update={
                "step": self.step + 1,
                "micro_batches": self.micro_batches + micro_batches,
                "tokens": self.tokens + tokens,
                "seconds": self.seconds + seconds,
                "metrics": metrics,
                "skipped": self.skipped + 1 if skipped else 0,
            }
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was verified. Weights are read on demand: `restore_student`, `read_trainer`."""

    folder: Path
    state: RunState


def checkpoints_folder(out: Path) -> Path:
    """Where the checkpoints of the run in `out` lie."""
    return out / "checkpoints"


def list_checkpoints(out: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first, unverified."""
    folder = checkpoints_folder(out)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_place)


def refuse_used(out: Path) -> None:
    """Refuse to start a run in a folder that holds another's checkpoints.

    Raises:
        RunError: there are some.
    """
    if list_checkpoints(out):
        raise RunError(
            "this folder already holds the checkpoints of a run.",
            place=str(out),
            remedy="Go on with `--resume`, or choose another output folder.",
        )


def remove_stale(out: Path) -> None:
    """Remove temporary folders that a killed process left; call it before the run's first save."""
    for path in checkpoints_folder(out).glob(f"{_TEMPORARY}*"):
        log.info("removing %s, left by an unfinished save", path)
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    out: Path, state: RunState, student: Mapping[str, Tensor], trainer: TrainerState, keep: int
) -> Path:
    """Write a checkpoint and remove all but the last `keep` ones.

    Checkpoints that lie beyond the new one are removed too: they are broken, or of a course the run did not take.

    Args:
        out: the run's folder.
        state: where the run stands; versions are filled in here.
        student: all student parameters by name, on any device, no two sharing memory.
        trainer: optimiser and random states.
        keep: how many checkpoints stay, at least 1.

    Raises:
        RunError: the disk is full or cannot be written. What was half written is gone, earlier checkpoints remain.
    """
    assert keep >= 1, keep
    folder = checkpoints_folder(out)
    target = folder / f"stage{state.stage_index}-step{state.step:06d}"
    temporary = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _write_files(temporary, state, student, trainer)
        _publish(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failure = _system_error(error) if isinstance(error, Exception) else None
        if failure is None:
            raise
        raise _write_error(folder, failure) from error
    for path in list_checkpoints(out):
        if _place(path) > _place(target):
            shutil.rmtree(path)
    for path in list_checkpoints(out)[:-keep]:
        shutil.rmtree(path)
    return target


def load_latest(out: Path) -> Checkpoint | None:
    """The newest whole checkpoint of the run in `out`; None if it has none at all.

    A broken one (a file missing, truncated or altered) is reported as a warning and the one before it is used.

    Raises:
        RunError: there are checkpoints, and all are broken.
    """
    folders = list_checkpoints(out)
    broken = []
    for folder in reversed(folders):
        reason = _reason_broken(folder)
        if reason is None:
            try:
                state = RunState.model_validate_json((folder / STATE).read_text("utf-8"))
                return Checkpoint(folder, state)
            except ValidationError as error:
                reason = f"{STATE} was written by another version of linearize ({error.errors()[0]['msg']})"
        log.warning("checkpoint %s cannot be used: %s; trying the one before it", folder, reason)
        broken.append(f"{folder.name}: {reason}")
    if not broken:
        return None
    raise RunError(
        f"all {len(broken)} checkpoints are broken ({'; '.join(broken)}).",
        place=str(checkpoints_folder(out)),
        remedy="Restore one from a copy, or start again in another output folder.",
    )


def check_same_run(checkpoint: Checkpoint, *, recipe_hash: str, corpus_fingerprint: str, seed: int) -> None:
    """Refuse to go on from a checkpoint of another recipe, corpus or seed.

    Raises:
        RunError: names what differs.
    """
    state = checkpoint.state
    pairs = {
        "recipe hash": (state.recipe_hash, recipe_hash),
        "corpus fingerprint": (state.corpus_fingerprint, corpus_fingerprint),
        "seed": (state.seed, seed),
    }
    differing = [f"{what} (saved {was}, now {now})" for what, (was, now) in pairs.items() if was != now]
    if differing:
        raise RunError(
            f"this checkpoint belongs to another run; differs in {' and '.join(differing)}.",
            place=str(checkpoint.folder),
            remedy="Resume with the recipe, data and seed it was made with, or choose another output folder.",
        )


def restore_student(checkpoint: Checkpoint, student: Mapping[str, Tensor]) -> None:
    """Copy the saved weights in place into `student`; parameters keep their device and identity.

    Raises:
        RunError: names, shapes or dtypes differ from the saved ones; nothing is copied then.
    """
    saved = load_file(checkpoint.folder / STUDENT)
    misfits = [f"{name} is missing" for name in student if name not in saved]
    misfits += [f"{name} is not in this student" for name in saved if name not in student]
    for name, tensor in student.items():
        if name in saved and (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
            was, now = saved[name], tensor
            misfits.append(f"{name} is {was.dtype} {tuple(was.shape)}, not {now.dtype} {tuple(now.shape)}")
    if misfits:
        raise RunError(
            f"the saved weights do not fit this student: {'; '.join(misfits[:5])} ({len(misfits)} in all).",
            place=str(checkpoint.folder / STUDENT),
            remedy="Resume with the recipe and teacher it was made with.",
        )
    with torch.no_grad():
        for name, tensor in student.items():
            tensor.copy_(saved[name])


def read_trainer(checkpoint: Checkpoint) -> TrainerState:
    """Read the optimiser and random states, on the CPU."""
    return torch.load(checkpoint.folder / TRAINER, map_location="cpu", weights_only=True)


def _place(folder: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1]), int(match[2])


def _write_files(folder: Path, state: RunState, student: Mapping[str, Tensor], trainer: TrainerState) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in student.items()}, folder / STUDENT)
    # through a Python file: torch's own writer hides the errno of a full disk
    with open(folder / TRAINER, "wb") as file:
        torch.save(trainer, file)
    _write_json(folder / STATE, state.model_copy(update={"versions": _versions()}).model_dump())
    _write_json(folder / MANIFEST, {name: _fingerprint(folder / name) for name in (STUDENT, TRAINER, STATE)})
    for name in (STUDENT, TRAINER, STATE, MANIFEST):
        _flush(folder / name)
    _flush(folder)


def _publish(temporary: Path, target: Path) -> None:
    """Give the written folder its name. One that has the name already steps aside: it was found broken, or is equal."""
    replaced = target.with_name(f"{_TEMPORARY}replaced-{target.name}")
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    _flush(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _flush(path: Path) -> None:
    """fsync a file or a folder: without it, a power cut may leave a renamed folder with empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _reason_broken(folder: Path) -> str | None:
    """Why this checkpoint cannot be used, or None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except ValueError:
        return f"{MANIFEST} is not JSON"
    if not isinstance(manifest, dict) or set(manifest) != {STUDENT, TRAINER, STATE}:
        return f"{MANIFEST} does not list {STUDENT}, {TRAINER} and {STATE}"
    for name, expected in manifest.items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            sizes = isinstance(expected, dict) and expected.get("size")
            what = "was altered" if sizes == found["size"] else f"has {found['size']} bytes instead of {sizes}"
            return f"{name} {what}"
    return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed (run from source)"
    return found


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind `error`: torch and safetensors wrap it in their own."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        code = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        if code:
            return OSError(int(code[1]), os.strerror(int(code[1])))
        error = error.__cause__ or error.__context__
    return None


def _write_error(folder: Path, error: OSError) -> RunError:
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "Free some space" if full else "Make the folder writable"
    return RunError(
        f"the checkpoint could not be written: {error.strerror or error} ({free / 1e6:.0f} MB free).",
        place=str(folder),
        remedy=f"{remedy}, then go on from the last checkpoint with `--resume`.",
    )
