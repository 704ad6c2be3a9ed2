"""When a run is saved, and how training goes on meanwhile: a copy in host memory, written by a thread."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from linearize.checkpoint import RunState, TrainerState, save_checkpoint
from linearize.distributed import Share
from linearize.randomness import RngState
from linearize.runs import FitSettings, Run
from linearize.stages.course import Course

log = logging.getLogger(__name__)


class Saver:
    """Saves when it is time to, and never the same step twice. A context: no write is under way after its end."""

    def __init__(
        self, run: Run, settings: FitSettings, share: Share, optimizer: torch.optim.Optimizer, course: Course
    ) -> None:
        self._run, self._settings, self._share = run, settings, share
        self._optimizer, self._course = optimizer, course
        self._saved = run.checkpoint.folder if run.checkpoint else None
        self._saved_step = run.checkpoint.state.step if run.checkpoint else None
        self._saved_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if self._writing is not None and (lost := self._writing.exception()) is not None:
            log.warning("a checkpoint could not be written: %s", lost)  # beside the error that ends the training

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step.

        Raises:
            RunError: the last one could not be written; said at the next step, not at the next checkpoint.
        """
        if self._writing is not None and self._writing.done():
            self._wait()
        steps, seconds = self._settings.save_every_steps, self._settings.save_every_seconds
        return (steps is not None and step % steps == 0) or time.monotonic() - self._saved_at >= seconds

    def save(self, state: RunState, rng: RngState) -> None:
        """Save, in the background if the settings say so; a write that is under way is waited for.

        All processes call it, and the main one writes.

        Raises:
            RunError: this checkpoint, or the one before, could not be written.
        """
        self._wait()
        if self._saved_step == state.step:
            return
        self._saved_step, self._saved_at = state.step, time.monotonic()
        self._share.exchange_weights(self._run.student)
        optimizer = self._share.optimizer_state(self._optimizer)
        if not self._run.processes.main:
            return
        trainer: TrainerState = {
            "names": self._share.all_names,
            "optimizer": optimizer,
            "rng": rng,
            "course": self._course.state(),
        }
        if self._settings.save_in_background:
            student = {name: _copy(tensor) for name, tensor in self._run.student.items()}
            trainer["optimizer"] = _copy(optimizer)
            self._writing = self._thread.submit(self._write, state, student, trainer)
        else:
            self._saved = self._write(state, dict(self._run.student), trainer)

    def save_and_wait(self, state: RunState, rng: RngState) -> Path:
        """Save, and return the checkpoint's folder when it is whole. Raises as `save` does."""
        self.save(state, rng)
        return self._run.processes.on_main(self._finished)

    def _finished(self) -> Path:
        self._wait()
        assert self._saved is not None
        return self._saved

    def _write(self, state: RunState, student: dict[str, Tensor], trainer: TrainerState) -> Path:
        self._run.metrics.sync()  # no checkpoint is ahead of metrics.jsonl
        return save_checkpoint(self._run.out, state, student, trainer, self._settings.keep)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._saved = writing.result()


def _copy(value: Any) -> Any:
    """A copy in host memory of the tensors in nested dicts and lists; all else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
