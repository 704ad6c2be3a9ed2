"""Many processes: what they tell each other, and what each does of a stage.

Every process runs the same program, and only the main one (rank 0) writes. accelerate or torchrun starts them and
accelerate finds their devices. Gradients are added up by hand, in flat buffers after the last micro-batch of a step:
`transfer` calls backward once a layer, inside the teacher's forward, which the hooks of DistributedDataParallel do not
allow; and the gradients of mixers and adapters are so small that hiding their exchange behind the backward gains
little.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from linearize.errors import LinearizeError, MainFailed, OtherFailed, RunError
from linearize.faults import OUT_OF_MEMORY, failed
from linearize.stages.base import StageConfig

T = TypeVar("T")
Split = Literal["data", "layers", "fsdp"]
SPLITS: dict[Split, str] = {
    "data": "each process takes its share of a step's rows, and holds the whole model",
    "layers": "in transfer each process runs and trains its layers, on all rows; other stages split by data",
    "fsdp": "as data, and the frozen base weights are sharded over the processes, layer by layer (FSDP2)",
}

BUCKET = 2**25
"""Elements of gradients that are exchanged at one time."""

WAIT = timedelta(hours=24)
"""How long processes wait for what the main one does alone: measuring a large model takes its time."""


@dataclass(frozen=True)
class Processes:
    """The processes of this run; `control` carries Python objects between them, on the CPU."""

    rank: int = 0
    count: int = 1
    control: Any = None  # a ProcessGroup; None where there is one process

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Of every process, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on the main process; the others wait for it.

        Raises:
            MainFailed: on the others, where it failed on the main process.
        """
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.main:
            try:
                outcome[1] = action()
            except Exception as error:
                failure, outcome[0] = error, f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if failure is not None:
            raise failure
        if outcome[0] is not None:
            raise MainFailed(outcome[0])
        found: T = outcome[1]
        return found

    def all_or_none(self, action: Callable[[], T]) -> T:
        """What `action`, in which processes do not wait for each other, returns here; if it succeeds on all of them.

        Raises:
            RunError: on all, if it failed on one of a LinearizeError or for want of memory: naming it, and of what.
        """
        if self.count == 1:
            return action()
        found: list[T] = []
        failure: Exception | None = None
        try:
            found.append(action())
        except (LinearizeError, *OUT_OF_MEMORY) as error:
            failure = error
        own = None if failure is None else failed(self.rank, failure)
        others = [words for words in self.gather(None if own is None else str(own)) if words is not None]
        if own is not None:
            raise own from failure
        if others:
            raise OtherFailed(others[0])
        return found[0]


ALONE = Processes()


def start_processes(device: str | None) -> Processes:
    """Join the processes that accelerate or torchrun started; `ALONE` without them.

    Raises:
        RunError: `device` names one card for all, or there are more processes than cards.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    cuda = torch.cuda.is_available() and device != "cpu"
    if device not in (None, "cpu", "cuda"):
        raise RunError(
            f"'{device}' is one device for {count} processes.", place="--device", remedy="Leave it out, or give cuda."
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if cuda and here > torch.cuda.device_count():
        raise RunError(
            f"{here} processes were started on a machine with {torch.cuda.device_count()} GPUs.",
            remedy="Start as many processes as there are GPUs, or give `--device cpu`.",
        )
    state = PartialState(cpu=not cuda)
    return Processes(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=WAIT))


def choose_split(asked: str | None, stages: Sequence[StageConfig], processes: Processes) -> Split:
    """The split that was asked for; without a word, `fsdp` where accelerate's launch file says so, else `data`.

    Raises:
        RunError: there is no such split, or it cannot do what the stages ask.
    """
    launched = processes.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    split: Any = asked or ("fsdp" if launched else "data")
    if split not in SPLITS:
        known = "; ".join(f"{name}: {what}" for name, what in SPLITS.items())
        raise RunError(f"'{split}' is no way to split a run ({known})", place="--split")
    if split != "data" and processes.count == 1:
        raise RunError(
            f"'{split}' needs more than one process.",
            place="--split",
            remedy="Start with `accelerate launch --config_file configs/launch/….yaml -m linearize.cli convert …`; "
            "`linearize plan` takes --processes.",
        )
    trains = [index for index, stage in enumerate(stages) if stage.trains_base]
    if split == "fsdp" and trains:
        raise RunError(
            f"'fsdp' shards base weights that stay frozen, but stages.{trains[0]} trains some "
            f"({', '.join(stages[trains[0]].train)}).",
            place="--split",
            remedy="Use `--split data`, or train mixers and lora.",
        )
    checked: Split = split
    return checked


def check_agreement(processes: Processes, what: str, value: object) -> None:
    """Refuse processes that were given different things.

    Raises:
        RunError: naming them.
    """
    found = processes.gather(value)
    if len(set(found)) > 1:
        raise RunError(
            f"the processes read different {what}: {', '.join(map(str, dict.fromkeys(found)))}.",
            remedy="Give all machines the same files.",
        )


def shared_micro_batch(config: StageConfig, count: int, stage_index: int) -> int:
    """Rows per forward so that `count` processes share a step's rows evenly: at most those of the recipe.

    Raises:
        RunError: the batch does not divide.
    """
    wanted = min(config.micro_batch, config.batch)
    fitting = [rows for rows in range(1, wanted + 1) if config.batch % (rows * count) == 0]
    if not fitting:
        possible = [number for number in range(1, config.batch + 1) if config.batch % number == 0]
        raise RunError(
            f"a batch of {config.batch} rows cannot be shared by {count} processes.",
            place=f"stages.{stage_index}",
            remedy=f"Start {', '.join(map(str, possible))} processes, or give a multiple of {count} with "
            f"`--set stages.{stage_index}.batch=`.",
        )
    return fitting[-1]


def share_rows(
    stages: Sequence[StageConfig], began: Sequence[int] | None, split: Split, processes: Processes, console: Console
) -> tuple[StageConfig, ...]:
    """The stages with micro-batches that the processes can share; a resumed run keeps the ones it `began` with.

    Means over tokens are taken within a micro-batch, so its rows belong to what a run computes.
    """
    shared = []
    for index, (stage, rows) in enumerate(zip(stages, began or [s.micro_batch for s in stages], strict=True)):
        stage = stage.model_copy(update={"micro_batch": min(rows, stage.batch)})
        by_layers = split == "layers" and stage.layers_train_alone
        fitting = stage.micro_batch if by_layers else shared_micro_batch(stage, processes.count, index)
        if fitting < stage.micro_batch:
            console.print(
                f"Stage {index}: {fitting} rows a micro-batch instead of {stage.micro_batch}, so that "
                f"{processes.count} processes share a step. Losses are means within micro-batches, and differ slightly "
                "from those of one process.",
                highlight=False,
            )
        shared.append(stage.model_copy(update={"micro_batch": fitting}))
    return tuple(shared)


def sharing(stages: Sequence[StageConfig], split: Split, processes: Processes) -> dict[str, Any]:
    """For run.json: how the work was shared when the run began."""
    return {"processes": processes.count, "split": split, "micro_batches": [stage.micro_batch for stage in stages]}


def share_of_layers(layers: Sequence[int], processes: Processes, stage_index: int) -> list[tuple[int, ...]]:
    """The layers of every process: neighbours, equally many but for one.

    Raises:
        RunError: there are fewer layers than processes.
    """
    if len(layers) < processes.count:
        raise RunError(
            f"{len(layers)} student layers cannot be split over {processes.count} processes.",
            place=f"stages.{stage_index}",
            remedy=f"Start at most {len(layers)} processes, or use `--split data`.",
        )
    ends = [len(layers) * rank // processes.count for rank in range(processes.count + 1)]
    return [tuple(layers[start:end]) for start, end in zip(ends, ends[1:], strict=False)]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over all processes, in place; a few flat buffers carry them."""
    for bucket in buckets(tensors):
        _add_up_bucket(bucket)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors that one flat buffer carries, one buffer after the other."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _add_up_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def send_from(rank: int, tensors: Sequence[Tensor]) -> None:
    """Make tensors equal to those of process `rank`, in place."""
    for tensor in tensors:
        dist.broadcast(tensor.data, src=rank)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes must run this model together, each gathering what the others hold."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module that may be sharded are there, outside of its own forward too."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@dataclass(frozen=True)
class StepReport:
    """What processes tell each other once a step.

    Attributes:
        metrics: of this process's part of the step.
        fault: which number is not finite, in words; or None.
        stop: whether a signal asks to stop.
        due: whether a checkpoint is due; the main process decides.
    """

    metrics: Mapping[str, float]
    fault: str | None
    stop: bool
    due: bool


@dataclass(frozen=True)
class Share:
    """What this process does of one stage.

    Attributes:
        processes: all of them.
        names: the parameters that each process trains; all the same where the split is by data.
        by_layers: each process trains layers of its own, on all rows.
    """

    processes: Processes
    names: tuple[tuple[str, ...], ...]
    by_layers: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        return self.names[self.processes.rank]

    @property
    def stride(self) -> int:
        """From one of this process's micro-batches to its next."""
        return 1 if self.by_layers else self.processes.count

    def micro_batches(self, first: int, accumulation: int) -> range:
        """The numbers of this process's micro-batches of the step whose first one is `first`."""
        whole = range(first, first + accumulation)
        return whole if self.by_layers else whole[self.processes.rank :: self.stride]

    def exchange_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients where all processes train the same parameters; a missing one counts as zero."""
        if self.processes.count == 1 or self.by_layers:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_up(parameter.grad for parameter in parameters if parameter.grad is not None)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Over the parameters of all processes."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not self.by_layers:
            return norm
        square = norm.square()
        dist.all_reduce(square)
        return square.sqrt()

    def agree(self, report: StepReport) -> StepReport:
        """The report on the whole step: means over processes, or sums of the layers' parts."""
        if self.processes.count == 1:
            return report
        reports = self.processes.gather(report)
        divisor = 1 if self.by_layers else self.processes.count
        names = dict.fromkeys(name for each in reports for name in each.metrics)
        metrics = {name: sum(each.metrics.get(name, 0.0) for each in reports) / divisor for name in names}
        metrics["grad_norm"] = report.metrics["grad_norm"]  # is of the whole already
        fault = next((each.fault for each in reports if each.fault is not None), None)
        return StepReport(metrics, fault, any(each.stop for each in reports), reports[0].due)

    def exchange_weights(self, student: Mapping[str, Tensor]) -> None:
        """Bring the layers that other processes trained here: before one measures or saves."""
        if self.by_layers:
            for rank, names in enumerate(self.names):
                send_from(rank, [student[name] for name in names])

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state dictionary over the parameters of all processes, in their order, on the main one."""
        own = optimizer.state_dict()
        if not self.by_layers:
            return own
        parts: list[Any] | None = [None] * self.processes.count if self.processes.main else None
        # in host memory: the tensors of a GPU would arrive on that very GPU
        sent = {index: {name: value.cpu() for name, value in held.items()} for index, held in own["state"].items()}
        dist.gather_object(sent, parts, dst=0, group=self.processes.control)
        state: dict[int, Any] = {}
        for rank, part in enumerate(parts or []):
            before = sum(len(names) for names in self.names[:rank])
            state |= {before + index: values for index, values in part.items()}
        return {"state": state, "param_groups": own["param_groups"]}

    @property
    def all_names(self) -> list[str]:
        """In the order of `optimizer_state`."""
        return [name for names in (self.names if self.by_layers else self.names[:1]) for name in names]
