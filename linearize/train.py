"""The one training loop. `fit` reads top to bottom; everything below it is a part it names.

A little over 400 lines: the loop, its schedules and its signals are read together, and nothing else uses them.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from linearize.checkpoint import (
    Checkpoint,
    RngState,
    RunState,
    TrainerState,
    check_same_run,
    get_rng_state,
    read_trainer,
    refuse_used,
    remove_stale,
    restore_student,
    save_checkpoint,
    seed_all,
    set_rng_state,
)
from linearize.data.prefetch import MadeAhead
from linearize.errors import NonFiniteLossError, RunError, RunInterrupted
from linearize.metrics import MetricsLog, Progress, Throughput, fetch_means, finite_or_null, peak_memory_bytes
from linearize.profiling import profiled
from linearize.spans import span
from linearize.stages.base import Batch, OptimizerConfig, Stage, StageConfig


class Batches(Protocol):
    """Micro-batches by number: a list, or `PackedRows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


@dataclass(frozen=True)
class FitSettings:
    """How to run a stage; nothing here changes what is learnt, apart from `mixed_precision`.

    Attributes:
        mixed_precision: `bf16` runs the forward under autocast; parameters, gradients and AdamW keep their own dtype.
        save_every_steps: steps between checkpoints; None = by time only.
        save_every_seconds: longest time without a checkpoint; the stage's end saves one in any case. `keep` stay.
        evaluate: returns numbers to log as `eval/<name>`. It must leave the model as it found it (train mode too);
            the random states are put back for it.
        eval_every_steps: steps between evaluations; None = at the stage's end only.
        profile: folder for a trace of a few steps, and a table of where their time goes; None = no profile.
    """

    mixed_precision: Literal["no", "bf16"] = "no"
    save_every_steps: int | None = None
    save_every_seconds: float = 120.0
    keep: int = 2
    evaluate: Callable[[], Mapping[str, float]] | None = None
    eval_every_steps: int | None = None
    profile: Path | None = None


@dataclass(frozen=True)
class Run:
    """What the stages of one run share.

    Attributes:
        out: the run's folder.
        stage_index: number of the stage that is being fitted, from 0.
        student: all student parameters by name (mixers, LoRA, and base weights that this stage or an earlier one
            trains): what every checkpoint stores, a superset of what the stage trains.
        checkpoint: where to go on from, if it is of this stage; else None, and the caller restores the student from
            the checkpoint of the stage before (`restore_student`).
        metrics, progress: the run's metrics.jsonl, and where progress is shown.
        seed: with the stage's index it gives the stage's random numbers.
        recipe_hash, corpus_fingerprint: a resumed run must have the same ones.
    """

    out: Path
    stage_index: int
    student: Mapping[str, Tensor]
    checkpoint: Checkpoint | None
    metrics: MetricsLog
    progress: Progress
    seed: int
    recipe_hash: str
    corpus_fingerprint: str


@dataclass(frozen=True)
class FitResult:
    """What a stage came to. Tokens and seconds count the whole stage, over interruptions; seconds only its training.

    `metrics` are those of the last step; `peak_memory_bytes` is what CUDA allocated at most, else the process's RSS.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    metrics: Mapping[str, float | None]
    peak_memory_bytes: int


def fit(stage: Stage, batches: Batches, run: Run, settings: FitSettings) -> FitResult:
    """Train `stage` for `stage.config.steps` optimiser steps, from its start or from `run.checkpoint`.

    Sets `requires_grad` of the stage's parameters; freezing the others, and putting it back, is the caller's part.
    Interrupted and resumed, a stage gives the losses and weights of an uninterrupted one, on the CPU to the last bit.

    Args:
        stage: what trains, and its losses.
        batches: micro-batches by number, at least steps × accumulation; reading one twice gives the same.

    Raises:
        RunError: the budget is below one batch, the checkpoint does not fit, or one cannot be written.
        NonFiniteLossError: the loss or the gradient became NaN or infinite; the weights are those before that step.
        RunInterrupted: on SIGINT or SIGTERM, after the current step and a checkpoint.
    """
    config = stage.config
    check_budget(config, run.stage_index)
    _check_batches(config, len(batches), run)
    parameters = _trainable(stage, run)
    device = next(iter(parameters.values())).device
    accelerator = _accelerator(device, settings.mixed_precision, config.accumulation)
    optimizer = _adamw(parameters, config.optimizer)
    state = _begin(stage, run, parameters, optimizer)
    saver = _Saver(run, settings, list(parameters), optimizer)
    throughput = Throughput()

    with (
        _interruptible() as interrupt,
        MadeAhead(batches, device) as ahead,
        run.progress.stage(stage.name, config.steps, state.step) as progress,
        profiled(settings.profile, f"stage{run.stage_index}", device) as step_ended,
    ):
        while not state.finished and not interrupt.signals:
            started, rng = time.perf_counter(), get_rng_state()  # the state to go back to if the step fails
            micro_batches, tokens = _forward_backward(stage, ahead, state.micro_batches, accelerator, device)
            with span("optimizer"):
                grad_norm = nn.utils.clip_grad_norm_(parameters.values(), config.optimizer.clip or math.inf)
            with span("wait"):
                metrics, fault = fetch_means(micro_batches, grad_norm, state.micro_batches)  # the step's only sync
            if fault is not None:
                raise _non_finite(state, config, fault, saver.save(state, rng))
            lr = learning_rate(state.step, config.steps, config.optimizer)
            _optimizer_step(optimizer, lr)
            seconds = time.perf_counter() - started
            throughput.add(tokens, seconds)
            metrics = metrics | {"lr": lr} | _evaluate(settings, state.step + 1, state.steps)
            state = state.advanced(config.accumulation, tokens, seconds, finite_or_null(metrics))
            run.metrics.write(_record(state, seconds, throughput))
            progress.update(state.step, metrics, throughput)
            step_ended()
            if saver.is_due(state):
                saver.save(state, get_rng_state())
        saved = saver.save(state, get_rng_state())
    if interrupt.signals:
        raise _interrupted(state, interrupt.signals[0], saved)
    speed = state.tokens / state.seconds if state.seconds else 0.0
    return FitResult(state.step, state.tokens, state.seconds, speed, state.metrics, peak_memory_bytes(device))


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step number `step` (from 0) of `steps`.

    The first `warmup` share of the steps climbs in equal parts from lr / (n + 1) and reaches the peak at step n; the
    schedule then goes from the peak to exactly `min_lr_ratio` × the peak at the last step.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * SCHEDULES[config.schedule](step - warmup, steps - warmup, steps, config)


def _cosine(step: int, after_warmup: int, steps: int, config: OptimizerConfig) -> float:
    share = step / max(1, after_warmup - 1)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def _constant(step: int, after_warmup: int, steps: int, config: OptimizerConfig) -> float:
    return 1.0


def _wsd(step: int, after_warmup: int, steps: int, config: OptimizerConfig) -> float:
    """Warm-up, stable, decay: at the peak, then linearly down over the last `decay` share of all steps."""
    decay = min(round(config.decay * steps), after_warmup)
    into_decay = step - (after_warmup - decay) + 1
    return 1.0 if into_decay <= 0 else 1 - (1 - config.min_lr_ratio) * into_decay / decay


# (step after the warm-up, steps after the warm-up, steps, config) -> share of the peak
SCHEDULES: dict[str, Callable[[int, int, int, OptimizerConfig], float]] = {
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}


def check_budget(config: StageConfig, stage_index: int) -> None:
    """Refuse a stage that would take no step.

    Raises:
        RunError: its tokens are fewer than one batch has.
    """
    place = f"stages.{stage_index}"
    if config.steps == 0:
        needed = config.length * config.batch
        raise RunError(
            f"a budget of {config.tokens} tokens is smaller than one batch: {config.batch} rows × {config.length} "
            f"tokens = {needed}.",
            place=place,
            remedy=f"Raise it with `--tokens {needed}` or more, or lower the batch with "
            f"`--set {place}.batch={max(1, config.tokens // config.length)}`.",
        )


def _check_batches(config: StageConfig, micro_batches: int, run: Run) -> None:
    place = f"stages.{run.stage_index}"
    needed = config.steps * config.accumulation
    if micro_batches < needed:
        raise RunError(
            f"{config.steps} steps need {needed} micro-batches of {config.micro_batch} rows; the corpus gives "
            f"{micro_batches}.",
            place=place,
            remedy=f"Add text, or lower `--set {place}.tokens=`.",
        )


def _trainable(stage: Stage, run: Run) -> dict[str, nn.Parameter]:
    parameters = dict(stage.trainable())
    if not parameters:
        raise RunError(f"stage '{stage.name}' trains no parameter.", place=f"stages.{run.stage_index}")
    missing = [name for name, parameter in parameters.items() if run.student.get(name) is not parameter]
    assert not missing, f"trained but not part of the checkpoint: {missing[:5]}"
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None  # a step that failed leaves its gradients
    return parameters


def _accelerator(device: torch.device, mixed_precision: str, accumulation: int) -> Accelerator:
    """An accelerator for the device the student already lies on."""
    shared = AcceleratorState._shared_state
    if shared and (AcceleratorState().mixed_precision, AcceleratorState().device.type) != (
        mixed_precision,
        device.type,
    ):
        # accelerate keeps one state a process and refuses another precision or device; a second stage may want one
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    if accelerator.distributed_type is not DistributedType.NO:
        raise RunError(
            f"launched on {accelerator.num_processes} processes ({accelerator.distributed_type}); "
            "training runs on one device.",
            remedy="Start without `accelerate launch`, or with `--num_processes 1`.",
        )
    # set, not passed: `accelerate launch` overrides the argument through its environment
    accelerator.gradient_accumulation_steps = accumulation
    return accelerator


def _adamw(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    tensors = list(parameters.values())
    fused = all(tensor.is_cuda for tensor in tensors)
    return torch.optim.AdamW(tensors, config.lr, config.betas, weight_decay=config.weight_decay, fused=fused)


def _begin(
    stage: Stage, run: Run, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> RunState:
    """Put everything where the stage starts or goes on: folder, weights, optimiser, random numbers, metrics.jsonl."""
    device = next(iter(parameters.values())).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    remove_stale(run.out)
    checkpoint = run.checkpoint
    if checkpoint is None:
        if run.stage_index == 0:
            refuse_used(run.out)
        seed_all(run.seed, run.stage_index)
        run.metrics.truncate_after(run.stage_index, 0)
        return RunState(
            stage_index=run.stage_index,
            stage_name=stage.name,
            steps=stage.config.steps,
            seed=run.seed,
            recipe_hash=run.recipe_hash,
            corpus_fingerprint=run.corpus_fingerprint,
            device=str(device),
        )
    assert checkpoint.state.stage_index == run.stage_index, (checkpoint.state.stage_index, run.stage_index)
    check_same_run(checkpoint, recipe_hash=run.recipe_hash, corpus_fingerprint=run.corpus_fingerprint, seed=run.seed)
    trainer = read_trainer(checkpoint)
    assert trainer["names"] == list(parameters), "the recipe is the same, so are the parameters it trains"
    restore_student(checkpoint, run.student)
    # the moments come from the checkpoint, the settings from the recipe: another device may not be fused
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": trainer["optimizer"]["state"], "param_groups": settings})
    set_rng_state(trainer["rng"])
    run.metrics.truncate_after(run.stage_index, checkpoint.state.step)
    return checkpoint.state.model_copy(update={"device": str(device)})


def _forward_backward(
    stage: Stage, batches: Batches, first: int, accelerator: Accelerator, device: torch.device
) -> tuple[list[Mapping[str, Tensor]], int]:
    """Add up the gradients of one step's micro-batches, from number `first` on; their metrics, and their tokens."""

    def backward(loss: Tensor) -> None:
        # gradients are taken in the dtypes the forward chose; autocast is for forwards only
        with torch.autocast(device.type, enabled=False):
            accelerator.backward(loss)  # divides by the accumulation

    metrics, tokens = [], 0
    for index in range(first, first + accelerator.gradient_accumulation_steps):
        with span("data"):
            batch = batches[index].to(device)
        with accelerator.autocast():
            metrics.append(stage.train_micro_batch(batch, backward))
        tokens += batch.tokens
    return metrics, tokens


def _optimizer_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    with span("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _evaluate(settings: FitSettings, step: int, steps: int) -> dict[str, float]:
    every = settings.eval_every_steps
    if settings.evaluate is None or not (step == steps or (every and step % every == 0)):
        return {}
    rng = get_rng_state()  # how often one evaluates must not change what is learnt
    found = settings.evaluate()
    set_rng_state(rng)
    return {f"eval/{name}": float(value) for name, value in found.items()}


def _record(state: RunState, seconds: float, throughput: Throughput) -> dict[str, object]:
    place = {"stage": state.stage_index, "name": state.stage_name, "step": state.step, "tokens": state.tokens}
    return place | state.metrics | {"seconds": seconds, "tokens_per_second": throughput.tokens_per_second}


class _Saver:
    """Saves when it is time to, and never the same step twice."""

    def __init__(self, run: Run, settings: FitSettings, names: list[str], optimizer: torch.optim.Optimizer) -> None:
        self._run, self._settings, self._names, self._optimizer = run, settings, names, optimizer
        self._saved = run.checkpoint.folder if run.checkpoint else None
        self._saved_step = run.checkpoint.state.step if run.checkpoint else None
        self._saved_at = time.monotonic()

    def is_due(self, state: RunState) -> bool:
        steps, seconds = self._settings.save_every_steps, self._settings.save_every_seconds
        return (steps is not None and state.step % steps == 0) or time.monotonic() - self._saved_at >= seconds

    def save(self, state: RunState, rng: RngState) -> Path:
        if self._saved is None or self._saved_step != state.step:
            self._run.metrics.sync()
            trainer: TrainerState = {"names": self._names, "optimizer": self._optimizer.state_dict(), "rng": rng}
            self._saved = save_checkpoint(self._run.out, state, self._run.student, trainer, self._settings.keep)
            self._saved_step, self._saved_at = state.step, time.monotonic()
        return self._saved


class _Interrupt:
    """The signals that asked to stop."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number))
        if len(self.signals) > 1:
            raise KeyboardInterrupt
        # written directly: a handler that runs within a print must not print
        os.write(2, b"\nstopping after this step and a checkpoint; once more to stop at once\n")


@contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    """Note SIGINT and SIGTERM instead of dying by them; a second one raises KeyboardInterrupt at once.

    Python allows this in the main thread only; elsewhere the handlers stay as they are.
    """
    interrupt = _Interrupt()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _interrupted(state: RunState, received: signal.Signals, saved: Path) -> RunInterrupted:
    return RunInterrupted(
        f"stopped by {received.name} after step {state.step} of {state.steps} of stage {state.stage_index} "
        f"({state.stage_name}); saved {saved}. Go on with the same command and `--resume`."
    )


def _non_finite(state: RunState, config: StageConfig, fault: str, saved: Path) -> NonFiniteLossError:
    place = f"stages.{state.stage_index}"
    return NonFiniteLossError(
        f"{fault}; the optimiser step was not taken.",
        place=f"{place} ({state.stage_name}), step {state.step + 1} of {state.steps}",
        remedy=f"The weights before it are in {saved}. Start again in another output folder with a lower learning rate "
        f"(`--set {place}.optimizer.lr=`, now {config.optimizer.lr:g}) or a longer warm-up; if the machine was at "
        "fault, go on with `--resume`.",
    )
