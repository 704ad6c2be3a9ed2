"""What a conversion would cost on this machine: measured on one micro-batch of every stage, before anything is run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from linearize.audit import Audit, audit
from linearize.distributed import Processes, choose_split, share_rows
from linearize.errors import RunError
from linearize.job import check_stream
from linearize.machine import Machine, Precision, choose_machine, read_device
from linearize.memory import StageMemory, Target, predict_memory, unpredictable
from linearize.metrics import peak_memory_bytes
from linearize.recipe import Recipe
from linearize.stages import Batch, Stage, StageConfig, build_stage, check_sizes, check_stages, refuse_base_training
from linearize.stages.base import Piece
from linearize.surgery import Graft, Swap, graft, plan_surgery, sliding_layers, with_frozen_teacher
from linearize.teacher import Teacher, load_teacher
from linearize.teacher_files import find_checkpoint, read_config

MINUTES = 15
"""`Plan.tokens_in_time` is the budget that trains in this time."""


@dataclass(frozen=True)
class StageCost:
    """What one stage costs; speeds are measured, times follow from them.

    `parts` is what trains, `trained` how many parameters that are. `peak_memory_bytes` is that of one batch, without
    the moments of the optimiser. `master_bytes` is what base weights take as fp32 beyond the dtype they came in; the
    peak holds it.
    """

    name: str
    tokens: int
    steps: int
    tokens_per_second: float
    peak_memory_bytes: int
    parts: tuple[str, ...]
    trained: int
    master_bytes: int

    @property
    def moment_bytes(self) -> int:
        """Of AdamW's two moments, in fp32."""
        return 2 * 4 * self.trained

    @property
    def seconds(self) -> float:
        return self.tokens / self.tokens_per_second


@dataclass(frozen=True)
class Plan:
    """The surgery and its price."""

    teacher: Teacher
    recipe: Recipe
    machine: Machine
    layers: int
    sliding: dict[int, int]  # layers that stay softmax because it slides already -> their windows
    swaps: tuple[Swap, ...]
    key_value_bytes: int  # of the teacher's cache, per token and sequence, in the layers that are replaced
    teacher_bytes: int  # of the frozen second copy; 0 where the student's own weights are the teacher's
    stages: list[StageCost]
    memory: list[StageMemory]  # predicted for this machine
    audit: Audit | None = None

    @property
    def parameters(self) -> int:
        """That the mixers add."""
        return sum(swap.parameters for swap in self.swaps)

    @property
    def state_bytes(self) -> int:
        """Of the student layers' decoding state, per sequence of any length."""
        return sum(swap.state_bytes for swap in self.swaps)

    @property
    def crossover_tokens(self) -> int:
        """Length from which that state is smaller than the keys and values of the layers it replaces."""
        return round(self.state_bytes / self.key_value_bytes) if self.key_value_bytes else 0

    @property
    def tokens_in_time(self) -> int:
        """The total budget whose training takes MINUTES, split over the stages as the recipe does."""
        seconds_per_token = sum(cost.tokens / self.recipe.tokens / cost.tokens_per_second for cost in self.stages)
        return int(MINUTES * 60 / seconds_per_token)


def plan_conversion(
    model: str,
    recipe: Recipe,
    device: str | None = None,
    *,
    audited: bool = False,
    text: str | None = None,
    quantize: str | None = None,
) -> Plan:
    """Load the teacher, plan the surgery and time one micro-batch of every stage on random tokens. Writes nothing.

    Args:
        model: as `convert` takes it.
        recipe: how to convert.
        device: `"cpu"`, `"cuda"`; None takes a GPU when there is one.
        audited: also compare the untrained student with its teacher, layer by layer.
        text: what that reads; None takes a passage that comes with linearize.
        quantize: the teacher's weights, `4bit` or `8bit`.

    Raises:
        LinearizeError: as `convert` would, for the model, the recipe and the surgery.
    """
    if quantize is not None:
        refuse_base_training(recipe.stages)
    machine = choose_machine(device, recipe.precision)
    teacher = load_teacher(model, dtype=machine.dtype, device=machine.device, quantize=quantize)
    swaps = plan_surgery(teacher.model, recipe.mixer, recipe.keep_softmax, recipe.replace_sliding)
    replaced = {swap.layer for swap in swaps}
    sliding = {layer: window for layer, window in sliding_layers(teacher.model).items() if layer not in replaced}
    check_stages(recipe.stages, swaps)
    check_sizes(recipe.stages, teacher.model)
    layers: int = teacher.model.config.num_hidden_layers
    element = torch.finfo(machine.dtype).bits // 8
    key_value_bytes = sum(
        swap.shapes.key_heads * (swap.shapes.key_width + swap.shapes.value_width) * element for swap in swaps
    )
    grafted = graft(teacher.model, swaps)
    teacher_bytes = 0
    if recipe.needs_frozen_teacher:
        grafted = with_frozen_teacher(grafted)
        teacher_bytes = sum(p.numel() * p.element_size() for p in grafted.observed.model.parameters())
    found = audit(grafted, teacher.tokenizer, text) if audited else None
    costs = [_cost(stage, grafted, machine) for stage in recipe.stages]
    target = Target(_kind(machine.device), machine.precision)
    config = teacher.model.config
    memory = [] if unpredictable(config, target) else predict_memory(config, recipe, target)
    return Plan(teacher, recipe, machine, layers, sliding, swaps, key_value_bytes, teacher_bytes, costs, memory, found)


@dataclass(frozen=True)
class Prediction:
    """The memory that a conversion needs, without a teacher's weights and without the device."""

    model: str
    target: Target
    memory: list[StageMemory]


def predict_conversion(model: str, recipe: Recipe, target: Target, console: Console) -> Prediction:
    """Predict peak memory from the teacher's configuration alone.

    Args:
        model: as `convert` takes it, or the path of a config.json.
        console: told where several processes need smaller micro-batches.

    Raises:
        LinearizeError: as `convert` would, for the model, the recipe, the surgery and how processes share the work.
    """
    path = Path(model).expanduser()
    where = path.parent if path.name == "config.json" and path.is_file() else model
    config = read_config(find_checkpoint(str(where)))
    obstacle = unpredictable(config, target)
    if obstacle:
        raise RunError(obstacle, place=model, remedy="Predict for a GPU: leave out --device cpu and precision: fp32.")
    stages = share_rows(recipe.stages, None, target.split, Processes(0, target.processes), console)
    return Prediction(model, target, predict_memory(config, recipe.model_copy(update={"stages": stages}), target))


def check_prediction_options(audited: bool, quantize: str | None) -> None:
    """Refuse what a prediction cannot take into account.

    Raises:
        RunError: an audit, or quantised weights.
    """
    for option, given, problem in (
        ("--audit", audited, "compares layers with their weights, which a prediction does not read"),
        (
            "--quantize",
            quantize is not None,
            "is not part of a prediction, which takes plain weights",
        ),
    ):
        if given:
            remedy = "Leave it out, or leave out --predict, --stream-layers, --processes and --split."
            raise RunError(problem, place=option, remedy=remedy)


def prediction_target(
    device: str | None, recipe: Recipe, streamed: bool, processes: int = 1, split: str | None = None
) -> Target:
    """Where a prediction is for: a GPU, where the user names none; `auto` precision is bf16 there, fp32 on a CPU.

    Raises:
        RunError: as `convert` would, where processes cannot split the work like this; for what is no device.
    """
    kind = _kind(read_device(device or "cuda"))
    usual: dict[str, Precision] = {"cuda": "bf16", "cpu": "fp32"}
    chosen = choose_split(split, recipe.stages, Processes(0, processes))
    if streamed:
        check_stream(recipe, chosen, quantized=False)
    precision = usual[kind] if recipe.precision == "auto" else recipe.precision
    return Target(kind, precision, streamed, processes, chosen)


def _kind(device: torch.device) -> Literal["cpu", "cuda"]:
    return "cuda" if device.type == "cuda" else "cpu"


def _cost(config: StageConfig, grafted: Graft, machine: Machine) -> StageCost:
    """Build a stage and measure it."""
    stage = build_stage(config, grafted)
    vocabulary: int = grafted.model.config.vocab_size
    pieces = config.pieces()
    measured = {piece.length: _measure(stage, machine, vocabulary, piece) for piece in pieces}
    seconds_per_token = sum(piece.tokens / config.tokens / measured[piece.length][0] for piece in pieces)
    speed, memory = 1 / seconds_per_token, max(peak for _, peak in measured.values())
    trained = list(stage.trainable().values())
    masters = sum(p.numel() * (4 - grafted.raised[p].itemsize) for p in trained if p in grafted.raised)
    size = sum(parameter.numel() for parameter in trained)
    return StageCost(stage.name, config.tokens, config.steps, speed, memory, config.train, size, masters)


def _measure(stage: Stage, machine: Machine, vocabulary: int, piece: Piece) -> tuple[float, int]:
    """Tokens per second and peak memory of one micro-batch; on a GPU of the second one, after a warm-up."""
    device, rows, length = machine.device, piece.rows, piece.length
    ids_BT = torch.randint(0, vocabulary, (rows, length))
    target_mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    target_mask_BT[:, -1] = False
    batch = Batch(ids_BT, torch.arange(length).expand(rows, -1), None, target_mask_BT).to(device)
    parameters = stage.trainable().values()
    for parameter in parameters:
        parameter.requires_grad_(True)
    seconds = 0.0
    for _ in range(2 if device.type == "cuda" else 1):
        _wait(device)
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=machine.precision == "bf16"):
            stage.train_micro_batch(batch, lambda loss: loss.backward())
        _wait(device)
        seconds = time.perf_counter() - started
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return batch.tokens / seconds, peak_memory_bytes(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
