"""Where the time of training goes: a few steps of a stage under torch's profiler, a trace and a table by part."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

from linearize.spans import PREFIX, SPANS

SKIPPED, STEPS = 3, 3
"""Steps that are not traced: kernels are compiled, memory is found; and steps that are."""

REST = "rest"
"""What belongs to no part: metrics.jsonl, the progress bar, checkpoints, measurements."""


@dataclass(frozen=True)
class PartTime:
    """What a part of a step takes, parts within it left out; milliseconds and kernels per step.

    `host_ms` is what Python and launching take, or, without a GPU, the computation itself; `device_ms` is the time of
    the kernels that the part launched, whenever they ran.
    """

    part: str
    host_ms: float
    device_ms: float
    kernels: float


class Interval(NamedTuple):
    """A part of a step on the host's clock, in microseconds."""

    name: str
    start: float
    end: float


class Launch(NamedTuple):
    """An operation's start on the host's clock and the time its kernels took, in microseconds."""

    start: float
    durations: tuple[float, ...]


def summarise(steps: Sequence[Interval], parts: Sequence[Interval], launches: Iterable[Launch]) -> list[PartTime]:
    """Give every moment of the steps, and every kernel, to the innermost part that it falls into.

    Gradients are launched by a thread of autograd's own: the clock decides, not the thread.
    """
    changes = _innermost([*(step._replace(name=REST) for step in steps), *parts])
    host: defaultdict[str, float] = defaultdict(float)
    for (begin, name), (end, _) in zip(changes, changes[1:], strict=False):
        host[name] += end - begin
    device: defaultdict[str, float] = defaultdict(float)
    kernels: Counter[str] = Counter()
    starts = [begin for begin, _ in changes]
    for launch in launches:
        place = bisect_right(starts, launch.start) - 1
        name = changes[place][1] if place >= 0 else ""
        device[name] += sum(launch.durations)
        kernels[name] += len(launch.durations)
    count = len(steps)
    names = [name for name in (*SPANS, REST) if host[name] or kernels[name]]
    return [PartTime(n, host[n] / count / 1e3, device[n] / count / 1e3, kernels[n] / count) for n in names]


def _innermost(nested: Iterable[Interval]) -> list[tuple[float, str]]:
    """When the innermost of nested intervals changes, and to which; "" outside all of them."""
    changes: list[tuple[float, str]] = []
    opened: list[Interval] = []

    def close_until(time: float) -> None:
        while opened and opened[-1].end <= time:
            end = opened.pop().end
            changes.append((end, opened[-1].name if opened else ""))

    for interval in sorted(nested, key=lambda interval: (interval.start, -interval.end)):
        close_until(interval.start)
        opened.append(interval)
        changes.append((interval.start, interval.name))
    close_until(float("inf"))
    return changes


@contextmanager
def profiled(folder: Path | None, name: str, device: torch.device) -> Iterator[Callable[[], object]]:
    """Trace a stage: what is yielded is to be called after every step.

    Writes `name`.trace.json for chrome://tracing or Perfetto, and `name`.json, the table. Without a folder, or in a
    stage of no more than SKIPPED steps, nothing is traced.
    """
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)

    def write(found: profile) -> None:
        found.export_chrome_trace(str(folder / f"{name}.trace.json"))
        parts = [asdict(part) for part in _parts(found)]
        (folder / f"{name}.json").write_text(json.dumps(parts, indent=2) + "\n", "utf-8")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    when = schedule(wait=SKIPPED - 1, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write) as profiler:
        yield profiler.step


def read_profile(folder: Path, name: str) -> list[PartTime]:
    """The table that `profiled` wrote; empty where it wrote none."""
    path = folder / f"{name}.json"
    return [PartTime(**part) for part in json.loads(path.read_text("utf-8"))] if path.is_file() else []


def profile_table(stage: str, parts: Sequence[PartTime]) -> Table:
    """Milliseconds and kernels per step, by part."""
    table = Table(title=f"Where a step of {stage} goes", title_justify="left")
    for number, column in enumerate(("part", "host, ms", "", "device, ms", "", "kernels")):
        table.add_column(column, justify="right" if number else "left")
    host, device = sum(part.host_ms for part in parts), sum(part.device_ms for part in parts)
    for part in parts:
        shares = [
            f"{value / whole:.0%}" if whole else "-"
            for value, whole in ((part.host_ms, host), (part.device_ms, device))
        ]
        table.add_row(
            part.part, f"{part.host_ms:.2f}", shares[0], f"{part.device_ms:.2f}", shares[1], f"{part.kernels:.0f}"
        )
    table.add_section()
    table.add_row("together", f"{host:.2f}", "", f"{device:.2f}", "", f"{sum(part.kernels for part in parts):.0f}")
    return table


def _parts(found: profile) -> list[PartTime]:
    on_host = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CPU]
    steps, parts, launches = [], [], []
    for event in on_host:
        start, end = event.time_range.start, event.time_range.end
        if event.name.startswith("ProfilerStep"):
            steps.append(Interval(event.name, start, end))
        elif event.name.startswith(PREFIX):
            parts.append(Interval(event.name.removeprefix(PREFIX), start, end))
        if event.kernels:
            launches.append(Launch(start, tuple(kernel.duration for kernel in event.kernels)))
    return summarise(steps, parts, launches)
