"""Prefill and decoding of a student beside its teacher, at equal settings, from short contexts to long ones.

Both models get the same random tokens, dtype, batch and greedy loop; CUDA graphs hold the decoding step of both or of
neither. Softmax attention is tried with each of PyTorch's kernels that runs, and the fastest counts.
"""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

import linearize.modeling  # noqa: F401 - registers the classes
from linearize.config import Config
from linearize.errors import RunError
from linearize.evals.records import Made, SpeedRow, make_folder, write_rows
from linearize.evals.stepping import WARM_STEPS, Step, captured, read_context, rewind, roomy_cache, state_bytes
from linearize.evals.subjects import surgery_of
from linearize.export import load_student
from linearize.machine import Machine, choose_machine, versions
from linearize.reach import last_position
from linearize.teacher import load_teacher

Mode = Literal["prefill", "decode"]
Say = Callable[[str], None]
Run = Callable[[int], list[float]]
"""Seconds of as many timings as asked, after a warm-up."""

KERNELS: dict[str, SDPBackend] = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Of softmax attention on GPUs; elsewhere PyTorch chooses."""

TRIES = {"prefill": 1, "decode": 8}
"""Timings that choose the kernel."""

PROBE_TOKENS = 256
"""Of the context in which the capture of a step is tried."""


class SpeedSettings(Config):
    """What is measured, and how often."""

    lengths: tuple[int, ...]
    batch: int = Field(1, ge=1)
    decode: int = Field(64, ge=1, description="decoding steps that are timed")
    repeats: int = Field(5, ge=1, description="prefills that are timed")
    graphs: bool = Field(True, description="hold decoding steps in CUDA graphs, where every model can be")
    seed: int = 0


@dataclass(frozen=True)
class TimedModel:
    """A model to be timed, and whether its decoding step goes into a graph."""

    name: Literal["teacher", "student"]
    model: PreTrainedModel
    attention: str  # softmax's implementation, or the mixer's kind
    softmax: bool  # whether any layer attends by softmax
    graphs: bool


def measure_speed(
    folder: Path, settings: SpeedSettings, teacher: str | None, device: str | None = None, say: Say = lambda _: None
) -> list[SpeedRow]:
    """Time a student and its teacher; `folder/evals/speed.json` is written anew after every row.

    Args:
        folder: the student's.
        settings: lengths in tokens, and the rest.
        teacher: what `--model` takes; None leaves the teacher out.
        say: told each finding as it is made.

    Raises:
        LinearizeError: for a folder, a teacher or a device that cannot be used.
    """
    machine = choose_machine(device, "auto")
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device.index or 0)  # streams, events and graphs belong to the current one
    subjects = _subjects(folder, teacher, machine, settings, say)
    make_folder(folder)
    made = Made(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        device=machine.name,
        command=_command(folder, settings, teacher, device),
        seed=settings.seed,
        versions=versions(),
    )
    rows: list[SpeedRow] = []
    for subject in subjects:
        with _moved(subject.model, machine.device):
            for length in settings.lengths:
                for mode in ("prefill", "decode"):
                    rows.append(_row(subject, settings, length, mode))
                    write_rows(folder, "speed", rows, made)
                    say(_sentence(rows[-1]))
    return rows


def _subjects(
    folder: Path, teacher: str | None, machine: Machine, settings: SpeedSettings, say: Say
) -> list[TimedModel]:
    """The models, still on the CPU, with one decision on graphs for all of them."""
    if not folder.is_dir():
        raise RunError("is no folder", place=str(folder), remedy="Give the --out folder of a finished run.")
    mixer, layers = surgery_of(str(folder))
    student = load_student(folder, dtype=machine.dtype)
    _check_positions(settings, last_position(student.config))
    mixed = len(layers) < student.config.num_hidden_layers
    kind = mixer.kind + (f" and {student.config._attn_implementation}" if mixed else "")
    subjects = [TimedModel("student", student, kind, mixed, False)]
    if teacher is not None:
        model = load_teacher(teacher, dtype=machine.dtype, device=torch.device("cpu")).model
        subjects.append(TimedModel("teacher", model, model.config._attn_implementation, True, False))
        if max(settings.lengths) > (known := model.config.max_position_embeddings):
            say(f"Beyond {known:,} positions the teacher's answers mean nothing; its time and memory still do.")
    if machine.device.type != "cuda" or not settings.graphs:
        return subjects
    faults = [f"{each.name}: {fault}" for each in subjects if (fault := _fault_of_capture(each, machine.device))]
    if faults:
        say(f"No CUDA graphs, for any model, because one cannot be captured: {'; '.join(faults)}.")
        return subjects
    say("Decoding steps run in CUDA graphs.")
    return [replace(subject, graphs=True) for subject in subjects]


def _check_positions(settings: SpeedSettings, last: int | None) -> None:
    """Refuse contexts that a family with a table of positions cannot read and go on from.

    Raises:
        RunError: naming them.
    """
    more = WARM_STEPS + max(settings.decode, TRIES["decode"])
    wrong = [f"{length:,}" for length in settings.lengths if last is not None and length + more > last]
    if wrong:
        raise RunError(
            f"{', '.join(wrong)} tokens: the model has learned {last:,} positions, and {more} are taken by decoding",
            place="--lengths",
            remedy="Choose shorter ones, or fewer steps with --decode.",
        )


def _fault_of_capture(subject: TimedModel, device: torch.device) -> str | None:
    """Why a step cannot be captured; None when it can."""
    with _moved(subject.model, device):
        try:
            _decode(replace(subject, graphs=True), _random_ids(subject.model, 1, PROBE_TOKENS, 0), 1)[0](1)
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def _row(subject: TimedModel, settings: SpeedSettings, length: int, mode: Mode) -> SpeedRow:
    """Time one task; one that does not fit is a row as well."""
    ids_BT = _random_ids(subject.model, settings.batch, length, settings.seed)
    common: dict[str, Any] = {
        "model": subject.name,
        "mode": mode,
        "length": length,
        "batch": settings.batch,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "cuda_graph": subject.graphs and mode == "decode",
    }
    count = settings.repeats if mode == "prefill" else settings.decode
    measured = None
    try:
        measured = _measured(subject, ids_BT, mode, count)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
    _release()  # the error held what was in memory
    if measured is None:
        unknown = dict.fromkeys(("seconds", "tokens_per_second", "peak_memory_bytes", "state_bytes"))
        return SpeedRow(**common, **unknown, attention=subject.attention, out_of_memory=True)
    middle = median(measured.seconds)
    notes = ["keys and values in memory taken once"] if subject.softmax and mode == "decode" else []
    return SpeedRow(
        **common,
        seconds=middle,
        tokens_per_second=settings.batch * (length if mode == "prefill" else 1) / middle,
        peak_memory_bytes=measured.peak_memory_bytes,
        state_bytes=measured.state_bytes,
        attention=subject.attention + (f" ({measured.kernel})" if measured.kernel else ""),
        runs=count,
        note="; ".join([*notes, *([measured.refused] if measured.refused else [])]),
    )


class _Measured(NamedTuple):
    """What one task took; `kernel` is the fastest of softmax attention, `refused` says which others did not run."""

    kernel: str | None
    seconds: list[float]
    peak_memory_bytes: int | None
    state_bytes: int
    refused: str


def _measured(subject: TimedModel, ids_BT: Tensor, mode: Mode, count: int) -> _Measured:
    """Time a task with the fastest kernel.

    Raises:
        RuntimeError: among others torch.OutOfMemoryError, when it fits with no kernel.
    """
    device = ids_BT.device
    run, state = TASKS[mode](subject, ids_BT, count)
    kernel, refused = None, ""
    if subject.softmax and device.type == "cuda":
        kernel, refused = _fastest_kernel(run, TRIES[mode])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _with_kernel(kernel):
        seconds = run(count)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return _Measured(kernel, seconds, peak, state(), refused)


def _fastest_kernel(run: Run, count: int) -> tuple[str, str]:
    """The fastest kernel, and why others do not run: PyTorch tells by many kinds of RuntimeError."""
    speeds: dict[str, float] = {}
    faults: dict[str, RuntimeError] = {}
    for name in KERNELS:
        try:
            with _with_kernel(name):
                speeds[name] = median(run(count))
        except RuntimeError as error:
            faults[name] = error.with_traceback(None)  # its frames hold memory
        _release()
    if not speeds:
        raise next((fault for fault in faults.values() if _is_out_of_memory(fault)), faults[next(iter(KERNELS))])
    refused = "; ".join(f"{name} refused: {str(fault).splitlines()[0]}" for name, fault in faults.items())
    return min(speeds, key=speeds.__getitem__), refused


@contextmanager
def _with_kernel(kernel: str | None) -> Iterator[None]:
    """Softmax attention by this kernel alone. Why it does not run, PyTorch says in warnings for each of the others."""
    if kernel is None:
        yield
        return
    with warnings.catch_warnings(), sdpa_kernel(KERNELS[kernel]):
        warnings.simplefilter("ignore", UserWarning)
        yield


def _prefill(subject: TimedModel, ids_BT: Tensor, count: int) -> tuple[Run, Callable[[], int]]:
    """The whole context at once into an empty cache, up to the next token; and the bytes that the cache then holds."""
    model, length = subject.model, ids_BT.shape[1]
    states = [0]

    @torch.no_grad()
    def once() -> None:
        cache = roomy_cache(model, length)
        logits = model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits[:, -1].argmax(-1)
        states[0] = state_bytes(cache)

    def run(times: int) -> list[float]:
        once()
        return _timed(once, times, ids_BT.device)

    return run, lambda: states[0]


def _decode(subject: TimedModel, ids_BT: Tensor, count: int) -> tuple[Run, Callable[[], int]]:
    """Single steps behind a context that is read first, in pieces and with any kernel; and the bytes of its state."""
    cache = roomy_cache(subject.model, ids_BT.shape[1] + WARM_STEPS + max(count, TRIES["decode"]))
    read_context(subject.model, cache, ids_BT)
    held = state_bytes(cache)

    def run(times: int) -> list[float]:
        with rewind(cache):
            step = Step(subject.model, cache, ids_BT[:, -1:], replayable=subject.graphs)
            if subject.graphs:
                return _timed(captured(step).replay, times, ids_BT.device)
            for _ in range(WARM_STEPS):
                step()
            return _timed(step, times, ids_BT.device)

    return run, lambda: held


TASKS: dict[Mode, Callable[[TimedModel, Tensor, int], tuple[Run, Callable[[], int]]]] = {
    "prefill": _prefill,
    "decode": _decode,
}


def _timed(call: Callable[[], None], times: int, device: torch.device) -> list[float]:
    """Seconds of each call; on a GPU between events of its stream, so that calls follow each other as in real use."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(times):
            call()
            marks.append(time.perf_counter())
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]


def _random_ids(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


@contextmanager
def _moved(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """The model on its device, and off it again: the other's peak of memory must not hold it."""
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to("cpu")  # type: ignore[arg-type]
        _release()


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of the CPU's allocator, which has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _sentence(row: SpeedRow) -> str:
    place = f"{row.model}, {row.mode} at {row.length:,} tokens"
    if row.seconds is None or row.tokens_per_second is None:
        return f"{place}: out of memory"
    return f"{place}: {1e3 * row.seconds:,.2f} ms, {row.tokens_per_second:,.0f} tokens/s, {row.attention}"


def _command(folder: Path, settings: SpeedSettings, teacher: str | None, device: str | None) -> str:
    """The command line that repeats this measurement."""
    words = ["linearize", "speed", str(folder), "--lengths", ",".join(map(str, settings.lengths))]
    words += ["--batch", str(settings.batch), "--decode", str(settings.decode), "--repeats", str(settings.repeats)]
    words += ["--no-teacher"] if teacher is None else ["--teacher", teacher]
    words += [] if settings.graphs else ["--no-graphs"]
    words += [] if device is None else ["--device", device]
    return shlex.join(words)
