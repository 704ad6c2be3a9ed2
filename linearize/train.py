"""The one training loop. `fit` reads top to bottom; everything below it is a part it names."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from linearize.checkpoint import (
    RunState,
    check_same_run,
    read_trainer,
    refuse_used,
    remove_stale,
    restore_student,
)
from linearize.data.prefetch import MadeAhead
from linearize.distributed import Processes, Share, StepReport, send_from, share_of_layers
from linearize.errors import NonFiniteLossError, RunError, RunInterrupted
from linearize.graphs import Launched, MicroBatches, Replayed
from linearize.metrics import Throughput, fetch_means, finite_or_null, peak_memory_bytes
from linearize.packed import with_starts
from linearize.profiling import profiled
from linearize.randomness import get_rng_state, seed_all, set_rng_state
from linearize.relay import Relay
from linearize.runs import FitResult, FitSettings, Run
from linearize.saving import Saver
from linearize.schedules import learning_rate
from linearize.signals import interruptible
from linearize.spans import span
from linearize.stages.base import Batch, OptimizerConfig, Stage, StageConfig

__all__ = ["Batches", "FitResult", "FitSettings", "Run", "check_budget", "fit", "learning_rate"]


DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
"""How accelerate may have started us; the sharding of FSDP is done here in any case."""


class Batches(Protocol):
    """Micro-batches by number: a list, or `PackedRows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


def fit(stage: Stage, batches: Batches, run: Run, settings: FitSettings) -> FitResult:
    """Train `stage` for `stage.config.steps` optimiser steps, from its start or from `run.checkpoint`.

    Sets `requires_grad` of the stage's parameters; freezing the others, and putting it back, is the caller's part.
    Interrupted and resumed, a stage gives the losses and weights of an uninterrupted one, on the CPU to the last bit.

    Args:
        stage: what trains, and its losses.
        batches: micro-batches by number, at least steps × accumulation; reading one twice gives the same.

    Raises:
        RunError: the budget is below one batch, the checkpoint does not fit, or one cannot be written.
        NonFiniteLossError: the loss or the gradient became NaN or infinite, and the stage is to stop then or has
            skipped too many such steps in a row; the weights are those before that step.
        RunInterrupted: on SIGINT or SIGTERM, after the current step and a checkpoint.
    """
    config = stage.config
    check_budget(config, run.stage_index)
    _check_batches(config, len(batches), run)
    work = _prepare(stage, batches, run, settings)
    share, optimizer = work.share, work.optimizer
    state = _begin(stage, run, share, optimizer)
    throughput, stop = Throughput(), False

    with (
        interruptible(run.processes) as interrupt,
        work.batches,
        closing(work.run_one),
        Saver(run, settings, share, optimizer, stage.course) as saver,
        run.progress.stage(stage.name, config.steps, state.step) as progress,
        profiled(settings.profile, f"stage{run.stage_index}", work.device) as step_ended,
    ):
        while not (state.finished or stage.course.finished or stop):
            stage.course.before_step(state.step)
            started, rng = time.perf_counter(), get_rng_state()  # the state to go back to if the step fails
            metrics, fault = work.gradients(state)  # the step's only sync
            due = run.processes.main and saver.is_due(state.step + 1)
            report = share.agree(StepReport(metrics, fault, bool(interrupt.signals), due))
            stop, lr = report.stop, learning_rate(state.step, config.steps, config.optimizer)
            metrics = {**report.metrics, "lr": lr}
            if report.fault is None:
                _optimizer_step(optimizer, lr)
                metrics |= stage.course.after_step(state.step + 1, report.metrics, optimizer)
            elif config.on_nonfinite == "stop" or state.skipped == config.max_skips:
                raise _non_finite(state, config, report.fault, saver.save_and_wait(state, rng))
            else:
                optimizer.zero_grad(set_to_none=True)
                run.progress.console.print(_skipped(state, report.fault), highlight=False, markup=False)
            seconds = time.perf_counter() - started
            throughput.add(config.length * config.batch, seconds)
            metrics |= _evaluate(settings, work, state)
            state = _advanced(state, config, seconds, metrics, report.fault is not None)
            if run.processes.main:
                run.metrics.write(_record(state, seconds, throughput))
            progress.update(state.step, metrics, throughput)
            step_ended()
            if report.due:
                saver.save(state, get_rng_state())
        saved = saver.save_and_wait(state, get_rng_state())
        stop = run.processes.any(bool(interrupt.signals))
    if stop:
        raise _interrupted(state, interrupt.signals, saved)
    share.exchange_weights(run.student)
    peak = max(run.processes.gather(peak_memory_bytes(work.device)))
    speed = state.tokens / state.seconds if state.seconds else 0.0
    return FitResult(state.step, state.tokens, state.seconds, speed, state.metrics, peak)


@dataclass(frozen=True)
class _Work:
    """What one step of a stage needs, on this process."""

    stage: Stage
    batches: MadeAhead
    run: Run
    share: Share
    parameters: dict[str, nn.Parameter]
    run_one: MicroBatches
    optimizer: torch.optim.Optimizer
    device: torch.device

    def gradients(self, state: RunState) -> tuple[dict[str, float], str | None]:
        """The clipped gradients of the next step; this process's metrics, and what in them is not finite."""
        config, parameters = self.stage.config, self.parameters.values()
        numbers = self.share.micro_batches(state.micro_batches, config.accumulation)
        self.run_one.begin_step()
        micro_batches = [self._micro_batch(number) for number in numbers]
        self.share.exchange_gradients(parameters)
        with span("optimizer"):
            norm = self.share.gradient_norm(parameters)
            nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip or math.inf, norm)
        with span("wait"):
            return fetch_means(micro_batches, norm, numbers)

    def _micro_batch(self, number: int) -> Mapping[str, Tensor]:
        """Add the gradients of one micro-batch. Its random numbers are its own: the same on any number of processes."""
        seed_all(self.run.seed, self.run.stage_index, number)
        with span("data"):
            batch = self.batches[number]
        return self.run_one(batch)


def _prepare(stage: Stage, batches: Batches, run: Run, settings: FitSettings) -> _Work:
    share = _share(stage, run)
    parameters = _trainable(stage, run, share)
    device = next(iter(parameters.values())).device
    accelerator = _accelerator(device, settings.mixed_precision, run.processes)
    # set, not passed: `accelerate launch` overrides the argument through its environment
    accelerator.gradient_accumulation_steps = stage.config.accumulation
    optimizer = _adamw(stage.course.groups(parameters), stage.config.optimizer)
    ahead = MadeAhead(batches, device, share.stride, finish=with_starts if settings.by_document else None)
    run_one = _micro_batches(stage, accelerator, list(parameters.values()), run, settings)
    return _Work(stage, ahead, run, share, parameters, run_one, optimizer, device)


def _micro_batches(
    stage: Stage, accelerator: Accelerator, parameters: Sequence[nn.Parameter], run: Run, settings: FitSettings
) -> MicroBatches:
    """How micro-batches run: launched, or replayed from CUDA graphs."""
    device = parameters[0].device

    def backward(loss: Tensor) -> None:
        # gradients are taken in the dtypes the forward chose; autocast is for forwards only
        with torch.autocast(device.type, enabled=False):
            accelerator.backward(loss)  # divides by the accumulation

    def work(batch: Batch) -> Mapping[str, Tensor]:
        with accelerator.autocast():
            return stage.train_micro_batch(batch, backward)

    # other processes' parts cannot be recorded, and a profile wants to see the parts of a step
    if settings.graphs and device.type == "cuda" and run.split == "data" and settings.profile is None:
        return Replayed(work, parameters, device)
    return Launched(work, device)


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
    empty = [piece.length for piece in config.pieces() if piece.steps == 0]
    if empty:
        raise RunError(
            f"{config.steps} steps are too few for lengths {list(config.lengths)}: none would have rows of {empty[0]}.",
            place=place,
            remedy=f"Raise the budget with `--set {place}.tokens=`, or take {empty[0]} out of {place}.lengths.",
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


def _share(stage: Stage, run: Run) -> Share:
    """What this process does of the stage. By layers where the run splits so and the stage's layers train alone."""
    if not (run.split == "layers" and stage.config.layers_train_alone):
        ordered = tuple(name for group in stage.course.groups(dict(stage.trainable())) for name in group)
        return Share(run.processes, (ordered,) * run.processes.count)
    layers = stage.by_layer()
    parts = share_of_layers(list(layers), run.processes, run.stage_index)
    stage.take_layers(parts[run.processes.rank], Relay(parts, run.processes, stage.config.accumulation).own_layers)
    names = tuple(tuple(name for layer in part for name in layers[layer]) for part in parts)
    return Share(run.processes, names, by_layers=True)


def _trainable(stage: Stage, run: Run, share: Share) -> dict[str, nn.Parameter]:
    """The parameters that this process trains."""
    trained = stage.trainable()
    if not trained:
        raise RunError(f"stage '{stage.name}' trains no parameter.", place=f"stages.{run.stage_index}")
    parameters = {name: trained[name] for name in share.own}
    missing = [name for name, parameter in parameters.items() if run.student.get(name) is not parameter]
    assert not missing, f"trained but not part of the checkpoint: {missing[:5]}"
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None  # a step that failed leaves its gradients
    return parameters


def _accelerator(device: torch.device, mixed_precision: str, processes: Processes) -> Accelerator:
    """An accelerator for the device the student already lies on."""
    # accelerate keeps one state a process and refuses another precision or device; a second stage may want one
    elsewhere = PartialState._shared_state and PartialState().device.type != device.type
    otherwise = AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision
    if elsewhere or otherwise:
        AcceleratorState._reset_state(reset_partial_state=processes.count == 1)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    if accelerator.num_processes != processes.count or accelerator.distributed_type not in DISTRIBUTED:
        raise RunError(
            f"launched as {accelerator.distributed_type} on {accelerator.num_processes} processes; this run has "
            f"{processes.count}.",
            remedy="Start with `accelerate launch` and a file of configs/launch/, or with torchrun.",
        )
    return accelerator


def _adamw(groups: list[dict[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """An optimiser group for each of `groups`. Its rate is `scale` × the schedule's; the course may change `scale`."""
    settings = [{"params": list(group.values()), "scale": 1.0} for group in groups]
    fused = all(parameter.is_cuda for group in groups for parameter in group.values())
    return torch.optim.AdamW(settings, config.lr, config.betas, weight_decay=config.weight_decay, fused=fused)


def _begin(stage: Stage, run: Run, share: Share, optimizer: torch.optim.Optimizer) -> RunState:
    """Put everything where the stage starts or goes on: folder, weights, optimiser, random numbers, metrics.jsonl."""
    device = next(iter(run.student.values())).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    checkpoint = run.checkpoint
    run.processes.on_main(lambda: _tidy(run))
    if checkpoint is None:
        seed_all(run.seed, run.stage_index)
        if run.processes.count > 1:
            send_from(0, list(run.student.values()))  # the same seed gives the same start; another card may not
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
    assert set(trainer["names"]) == set(stage.trainable()), "the recipe is the same, so are the parameters it trains"
    restore_student(checkpoint, run.student)
    # the moments come from the checkpoint, the settings from the recipe: another device may not be fused
    settings, saved = optimizer.state_dict()["param_groups"], trainer["optimizer"]["state"]
    places = {name: place for place, name in enumerate(trainer["names"])}
    own = {index: saved[places[name]] for index, name in enumerate(share.own) if places[name] in saved}
    optimizer.load_state_dict({"state": own, "param_groups": settings})
    stage.course.restore(trainer["course"], optimizer)
    set_rng_state(trainer["rng"])
    done = checkpoint.state.step * stage.config.accumulation  # other rows a micro-batch, on other processes
    return checkpoint.state.model_copy(update={"device": str(device), "micro_batches": done})


def _tidy(run: Run) -> None:
    """Remove what a killed process left behind; refuse a folder that holds another run."""
    remove_stale(run.out)
    if run.checkpoint is None and run.stage_index == 0:
        refuse_used(run.out)
    run.metrics.truncate_after(run.stage_index, 0 if run.checkpoint is None else run.checkpoint.state.step)


def _optimizer_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    with span("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _evaluate(settings: FitSettings, work: _Work, state: RunState) -> dict[str, float]:
    """What is measured after the step that follows `state`. Every process measures: waiting for one takes as long.

    They agree on faults, unless they gather weights as they measure: who fails then is told of by `faults.told`.
    """
    every, step, run = settings.eval_every_steps, state.step + 1, work.run
    last = step == state.steps or work.stage.course.finished
    if settings.evaluate is None or not (last or (every and step % every == 0)):
        return {}
    work.share.exchange_weights(run.student)
    rng = get_rng_state()  # how often one evaluates must not change what is learnt
    seed_all(run.seed, run.stage_index)
    found = settings.evaluate() if run.split == "fsdp" else run.processes.all_or_none(settings.evaluate)
    set_rng_state(rng)
    return {f"eval/{name}": float(value) for name, value in found.items()}


def _advanced(
    state: RunState, config: StageConfig, seconds: float, metrics: Mapping[str, float], skipped: bool
) -> RunState:
    """The state one step later."""
    tokens = config.length * config.batch
    return state.advanced(config.accumulation, tokens, seconds, finite_or_null(metrics), skipped)


def _record(state: RunState, seconds: float, throughput: Throughput) -> dict[str, object]:
    place = {"stage": state.stage_index, "name": state.stage_name, "step": state.step, "tokens": state.tokens}
    place |= {"skipped": state.skipped} if state.skipped else {}
    return place | state.metrics | {"seconds": seconds, "tokens_per_second": throughput.tokens_per_second}


def _interrupted(state: RunState, received: list[signal.Signals], saved: Path) -> RunInterrupted:
    by = received[0].name if received else "another process"
    return RunInterrupted(
        f"stopped by {by} after step {state.step} of {state.steps} of stage {state.stage_index} "
        f"({state.stage_name}); saved {saved}. Go on with the same command and `--resume`."
    )


def _skipped(state: RunState, fault: str) -> str:
    return (
        f"Skipped step {state.step + 1} of stage {state.stage_index} ({state.stage_name}): {fault}; weights and "
        "optimiser stay as they were."
    )


def _non_finite(state: RunState, config: StageConfig, fault: str, saved: Path) -> NonFiniteLossError:
    place = f"stages.{state.stage_index}"
    before = f" {state.skipped} steps in a row were skipped before it." if state.skipped else ""
    return NonFiniteLossError(
        f"{fault}; the optimiser step was not taken.{before}",
        place=f"{place} ({state.stage_name}), step {state.step + 1} of {state.steps}",
        remedy=f"The weights before it are in {saved}. Start again in another output folder with a lower learning rate "
        f"(`--set {place}.optimizer.lr=`, now {config.optimizer.lr:g}), a longer warm-up, or with "
        f"`--set {place}.on_nonfinite=skip` where single batches are at fault; if the machine was, go on with "
        "`--resume`.",
    )
