"""The one training loop. `fit` reads top to bottom; everything below it is a part it names."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from linearize.checkpoint import (
    RunState,
    check_same_run,
    get_rng_state,
    read_trainer,
    refuse_used,
    remove_stale,
    restore_student,
    seed_all,
    set_rng_state,
)
from linearize.errors import NonFiniteLossError, RunError, RunInterrupted
from linearize.metrics import Throughput, fetch_means, finite_or_null, peak_memory_bytes
from linearize.runs import FitResult, FitSettings, Run
from linearize.saving import Saver
from linearize.schedules import learning_rate
from linearize.signals import interruptible
from linearize.stages.base import Batch, OptimizerConfig, Stage, StageConfig

__all__ = ["Batches", "FitResult", "FitSettings", "Run", "check_budget", "fit", "learning_rate"]


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
    parameters = _trainable(stage, run)
    device = next(iter(parameters.values())).device
    accelerator = _accelerator(device, settings.mixed_precision, config.accumulation)
    optimizer = _adamw(parameters, config.optimizer)
    state = _begin(stage, run, parameters, optimizer)
    throughput = Throughput()

    with (
        interruptible() as interrupt,
        Saver(run, settings, list(parameters), optimizer) as saver,
        run.progress.stage(stage.name, config.steps, state.step) as progress,
    ):
        while not state.finished and not interrupt.signals:
            started, rng = time.perf_counter(), get_rng_state()  # the state to go back to if the step fails
            micro_batches, tokens = _forward_backward(stage, batches, state.micro_batches, accelerator, device)
            grad_norm = nn.utils.clip_grad_norm_(parameters.values(), config.optimizer.clip or math.inf)
            metrics, fault = fetch_means(micro_batches, grad_norm, state.micro_batches)  # the step's only sync
            lr = learning_rate(state.step, config.steps, config.optimizer)
            if fault is None:
                _optimizer_step(optimizer, lr)
            elif config.on_nonfinite == "stop" or state.skipped == config.max_skips:
                raise _non_finite(state, config, fault, saver.save_and_wait(state, rng))
            else:
                optimizer.zero_grad(set_to_none=True)
                run.progress.console.print(_skipped(state, fault), highlight=False, markup=False)
            seconds = time.perf_counter() - started
            throughput.add(tokens, seconds)
            metrics = metrics | {"lr": lr} | _evaluate(settings, state.step + 1, state.steps)
            state = state.advanced(config.accumulation, tokens, seconds, finite_or_null(metrics), fault is not None)
            run.metrics.write(_record(state, seconds, throughput))
            progress.update(state.step, metrics, throughput)
            if saver.is_due(state):
                saver.save(state, get_rng_state())
        saved = saver.save_and_wait(state, get_rng_state())
    if interrupt.signals:
        raise _interrupted(state, interrupt.signals[0], saved)
    speed = state.tokens / state.seconds if state.seconds else 0.0
    return FitResult(state.step, state.tokens, state.seconds, speed, state.metrics, peak_memory_bytes(device))


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
        batch = batches[index].to(device)
        with accelerator.autocast():
            metrics.append(stage.train_micro_batch(batch, backward))
        tokens += batch.tokens
    return metrics, tokens


def _optimizer_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
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
    place |= {"skipped": state.skipped} if state.skipped else {}
    return place | state.metrics | {"seconds": seconds, "tokens_per_second": throughput.tokens_per_second}


def _interrupted(state: RunState, received: signal.Signals, saved: Path) -> RunInterrupted:
    return RunInterrupted(
        f"stopped by {received.name} after step {state.step} of {state.steps} of stage {state.stage_index} "
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
