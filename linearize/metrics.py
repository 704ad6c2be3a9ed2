"""What a run reports while it trains: `metrics.jsonl`, a progress bar (plain lines in a log file), tokens a second."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichBar
from torch import Tensor

from linearize.errors import RunError

log = logging.getLogger(__name__)

# Fields of a record that depend on the machine's speed; all others repeat to the last bit on the CPU.
TIMING_FIELDS = ("seconds", "tokens_per_second")


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, flushed as it is written, with at least `stage` and `step`.

    Use as a context manager, or call `close`. Every record that was written is also given to `also`.
    """

    def __init__(self, path: Path, also: Callable[[Mapping[str, Any]], None] = lambda record: None) -> None:
        self.path, self._also = path, also
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it must name its `stage` (index) and `step`; no NaN (see `finite_or_null`)."""
        assert {"stage", "step"} <= record.keys(), record
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._also(record)

    def sync(self) -> None:
        """Bring all records to the disk; done before each checkpoint, so that no checkpoint is ahead of this file."""
        os.fsync(self._file.fileno())

    def truncate_after(self, stage: int, step: int) -> None:
        """Drop the records beyond (stage, step), and a last line that a killed process left unfinished.

        A resumed run calls this with the place of its checkpoint, so that its file equals an uninterrupted one.
        """
        lines = self.path.read_text("utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _is_within(line, stage, step)]
        if len(kept) == len(lines):
            return
        log.info("%s: dropping %d records beyond step %d of stage %d", self.path, len(lines) - len(kept), step, stage)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(kept), "utf-8")
        self._file.close()
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, oldest first; an unfinished last line is left out.

    Raises:
        RunError: a line is no record.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            remedy = "Delete the line: the run itself does not need it."
            raise RunError("holds no record", place=f"{path}, line {number}", remedy=remedy) from None
    return found


def fetch_means(
    micro_batches: list[Mapping[str, Tensor]], grad_norm: Tensor, numbers: range
) -> tuple[dict[str, float], str | None]:
    """Bring a step's numbers to the CPU, in one copy.

    Args:
        micro_batches: the scalar metrics of each micro-batch, `loss` among them.
        grad_norm: scalar; where all numbers are gathered.
        numbers: of the micro-batches within the stage.

    Returns:
        The means over the micro-batches and `grad_norm`; and which loss or norm is not finite, in words, or None.
    """
    device = grad_norm.device
    tensors = [value for metrics in micro_batches for value in metrics.values()] + [grad_norm]
    flat = torch.stack([tensor.detach().to(device, torch.float32) for tensor in tensors]).tolist()
    norm = flat.pop()
    values = iter(flat)
    fetched = [{name: next(values) for name in metrics} for metrics in micro_batches]
    means = {name: sum(metrics[name] for metrics in fetched) / len(fetched) for name in fetched[0]}
    fault = None if math.isfinite(norm) else f"micro-batches {numbers[0]} to {numbers[-1]}: gradient norm {norm}"
    for number, metrics in reversed(list(zip(numbers, fetched, strict=True))):
        if not math.isfinite(metrics["loss"]):
            fault = f"micro-batch {number}: loss {metrics['loss']}"
    return means | {"grad_norm": norm}, fault


def finite_or_null(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """NaN and infinity as null, for JSON: a stage's own metric may be NaN (a quantile of nothing)."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """The most CUDA had allocated on `device`; on other devices the most memory the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Throughput:
    """Tokens per second over the last `window` steps; only what is given to `add` counts."""

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)

    def add(self, tokens: int, seconds: float) -> None:
        self._steps.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(seconds for _, seconds in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds else 0.0

    @property
    def seconds_per_step(self) -> float:
        return sum(seconds for _, seconds in self._steps) / len(self._steps) if self._steps else 0.0


class StageProgress:
    """The progress of one stage; made by `Progress.stage`."""

    def __init__(self, console: Console, bar: tuple[RichBar, TaskID] | None, name: str, steps: int) -> None:
        self._console, self._bar, self._name, self._steps = console, bar, name, steps
        self._started = self._said_at = time.monotonic()
        self._said_step: int | None = None

    def update(self, step: int, metrics: Mapping[str, float], throughput: Throughput) -> None:
        """Show that `step` steps are done.

        Args:
            step: steps done, from 1.
            metrics: the step's metrics; those whose name contains `loss` are shown.
            throughput: where tokens a second and the time to go come from.
        """
        losses = " ".join(f"{key} {value:.4g}" for key, value in metrics.items() if "loss" in key)
        elapsed = _clock(time.monotonic() - self._started)
        left = _clock((self._steps - step) * throughput.seconds_per_step)
        status = f"{losses}  {throughput.tokens_per_second:,.0f} tokens/s  {elapsed} elapsed, {left} to go"
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=step, status=status)
        elif self._is_due(step):
            self._said_at, self._said_step = time.monotonic(), step
            line = f"{self._name} step {step}/{self._steps}  {status}"
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _is_due(self, step: int) -> bool:
        """A log file gets the first line, then one for every 20 seconds or tenth of the steps, and the last."""
        if self._said_step is None or step == self._steps:
            return True
        tenth = (step * 10) // self._steps > (self._said_step * 10) // self._steps
        return tenth or time.monotonic() - self._said_at >= Progress.LINE_SECONDS


class Progress:
    """Progress of a run on a terminal; plain lines where the output is no terminal. `Console(quiet=True)` is silent."""

    LINE_SECONDS = 20.0

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def stage(self, name: str, steps: int, done: int = 0) -> Iterator[StageProgress]:
        """Show a stage of `steps` steps, `done` of which were taken before, until the block ends."""
        if not self.console.is_terminal:
            yield StageProgress(self.console, None, name, steps)
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}", markup=False),
        )
        with RichBar(*columns, console=self.console) as bar:
            yield StageProgress(
                self.console, (bar, bar.add_task(name, total=steps, completed=done, status="")), name, steps
            )


def _is_within(line: str, stage: int, step: int) -> bool:
    """Whether a line is whole and its record not beyond (stage, step)."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return line.endswith("\n") and (record["stage"], record["step"]) <= (stage, step)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
