"""The memory that training takes, predicted: from a configuration alone, on a machine without the device.

What lives all the time is counted: weights, mixers, adapters, AdamW's moments, buffers of streamed layers. What comes
and goes is traced: one micro-batch of the very stage runs on tensors that have shapes and no memory, and every storage
is followed from its making to its end. Decoders are traced at two small depths; what grows with depth, grows linearly.

Not seen: work space within an operation, and what CUDA itself takes beside its allocator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from linearize.families import FAMILIES, has_experts
from linearize.live_memory import BLOCK, LiveMemory
from linearize.machine import DTYPES, Precision
from linearize.packed import softmax_by_document
from linearize.recipe import Recipe
from linearize.stages import Batch, Stage, StageConfig, build_stage, check_sizes, check_stages
from linearize.surgery import EveryNth, Graft, graft, plan_surgery, with_frozen_teacher
from linearize.teacher import choose_attention
from linearize_kernels import backend

CUBLAS_BYTES = 2 * 32 * 2**20
"""Work space that torch gives cuBLAS on Hopper: 32 MiB for each thread that multiplies, forward's and backward's."""


@dataclass(frozen=True)
class Target:
    """Where training would run.

    `streamed`: frozen layers lie in host memory, but for the one that computes and the next.
    """

    device: Literal["cpu", "cuda"] = "cuda"
    precision: Precision = "bf16"
    streamed: bool = False


@dataclass(frozen=True)
class StageMemory:
    """What one stage needs at its peak, in bytes by term; and the part of a step in which the peak lies."""

    name: str
    terms: dict[str, int]
    peak_in: str

    @property
    def peak(self) -> int:
        return sum(self.terms.values())


MADE_IN = {
    "": "batch and mask",
    "teacher": "made by the teacher's pass",
    "student": "made by the student's pass",
    "loss": "made by the loss",
    "backward": "made by the backward pass, gradients among it",
}
"""Terms of what lives at the peak and was made during the step."""


def predict_memory(config: PreTrainedConfig, recipe: Recipe, target: Target) -> list[StageMemory]:
    """Predict every stage of a recipe, for a teacher that need not exist.

    Args:
        config: the teacher's.
        recipe: how to convert; its stages come one after the other, adapters stay.
        target: device, precision, and whether layers are streamed.

    Raises:
        LinearizeError: as the conversion would, for the surgery and the recipe.
    """
    depth: int = config.num_hidden_layers
    small, large = _depths(config, recipe)
    resident = _resident(_build(config, recipe, target, depth), recipe, target)
    traced = [_trace(_build(config, recipe, target, layers), recipe, target) for layers in sorted({small, large})]
    found = []
    for index, stage in enumerate(recipe.stages):
        peaks = (
            traced[0][index] if small == large else _deepen(traced[0][index], traced[1][index], (small, large, depth))
        )
        where, at_peak = max(peaks.items(), key=lambda item: sum(item[1].values()))
        terms = resident[index] | {MADE_IN[made]: size for made, size in at_peak.items()}
        found.append(
            StageMemory(stage.kind, {name: size for name, size in terms.items() if size > 0}, where or "batch")
        )
    return found


def unpredictable(config: PreTrainedConfig, target: Target) -> str:
    """Why the memory of such a teacher cannot be predicted; empty where it can.

    Experts in fp32 pick their rows by what is in them, and tensors without memory have nothing in them.
    """
    fp32_experts = has_experts(config) and target.precision == "fp32"
    return "experts in fp32 cannot be traced without computing" if fp32_experts else ""


Peaks = dict[str, dict[str, int]]
"""Of each part of a step, what lives at its own peak, by the part that made it."""


def _depths(config: PreTrainedConfig, recipe: Recipe) -> tuple[int, int]:
    """Two depths, some periods of the pattern of layers apart; the same one twice: trace all of it."""
    depth, keep = config.num_hidden_layers, recipe.keep_softmax
    if isinstance(keep, tuple):
        return depth, depth
    every = keep.every if isinstance(keep, EveryNth) else 1
    lists = list(_by_layer(config).values())
    kinds = [(index % every, *(entries[index] for entries in lists)) for index in range(depth)]
    period = next(size for size in range(1, depth + 1) if all(kinds[i] == kinds[i % size] for i in range(depth)))
    step = max(2, period)
    small = step + depth % period  # so that whole periods are missing up to the full depth
    return (depth, depth) if small + step >= depth else (small, small + step)


def _by_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """What the configuration says of each layer by itself."""
    names = {"layer_types", *(family.rope_layers for family in FAMILIES.values() if family.rope_layers is not None)}
    return {name: entries for name, entries in config.to_dict().items() if name in names and entries is not None}


def _deepen(one: Peaks, two: Peaks, depths: tuple[int, int, int]) -> Peaks:
    """What the third depth would give, on the line through the first two."""
    small, large, depth = depths
    steps = (depth - large) / (large - small)
    return {
        where: {made: round(size + steps * (size - one.get(where, {}).get(made, 0))) for made, size in at_peak.items()}
        for where, at_peak in two.items()
    }


def _build(config: PreTrainedConfig, recipe: Recipe, target: Target, layers: int) -> Graft:
    """The grafted model on the meta device, with so many layers."""
    cut = {name: entries[:layers] for name, entries in _by_layer(config).items()}
    config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers} | cut)
    dtype = DTYPES[target.precision]
    attention, _ = choose_attention(config, dtype, torch.device("cpu"), None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.eval().requires_grad_(False)
    plan = plan_surgery(model, recipe.mixer, recipe.keep_softmax, recipe.replace_sliding)
    check_stages(recipe.stages, plan)
    check_sizes(recipe.stages, model)
    grafted = graft(model, plan)
    return with_frozen_teacher(grafted) if recipe.needs_frozen_teacher else grafted


def _resident(grafted: Graft, recipe: Recipe, target: Target) -> list[dict[str, int]]:
    """What lives during the whole of each stage."""
    found = []
    frozen_teacher = 0 if grafted.teacher is None else _size(grafted.observed.model.parameters())
    for config in recipe.stages:
        stage = build_stage(config, grafted)
        mixers = _size(grafted.mixer_parameters().values())
        adapters = _size(p for name, p in grafted.model.named_parameters() if ".lora_" in name)
        layers = [
            _size(p for name, p in layer.named_parameters() if ".mixer." not in name and ".lora_" not in name)
            for layer in grafted.decoder_layers
        ]
        base = _size(grafted.model.parameters()) - mixers - adapters
        streamed = {"weights beside the layers": base - sum(layers), "two streamed layers": 2 * max(layers)}
        found.append(
            (streamed if target.streamed else {"base weights": base})
            | {
                "frozen teacher": frozen_teacher,
                "mixers": mixers,
                "adapters": adapters,
                "AdamW moments": 2 * _size(stage.trainable().values()),
                "cuBLAS work space": CUBLAS_BYTES if target.device == "cuda" else 0,
            }
        )
    return found


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes, as the allocator rounds them; each tensor once."""
    once = {id(x): x for x in tensors}.values()
    return sum(-(-x.numel() * x.element_size() // BLOCK) * BLOCK for x in once)


def _trace(grafted: Graft, recipe: Recipe, target: Target) -> list[Peaks]:
    """One micro-batch of every stage."""
    found = []
    for config in recipe.stages:
        if target.streamed and "checkpoint_activations" in type(config).model_fields:
            config = config.model_copy(update={"checkpoint_activations": True})
        grafted.model.requires_grad_(False)
        stage = build_stage(config, grafted)
        for parameter in stage.trainable().values():
            parameter.requires_grad_(True)
        found.append(_trace_stage(stage, config, grafted, target))
    return found


def _trace_stage(stage: Stage, config: StageConfig, grafted: Graft, target: Target) -> Peaks:
    rows, length = min(config.micro_batch, config.batch), config.length
    mixed = torch.autocast("cpu", torch.bfloat16) if target.precision == "bf16" else nullcontext()
    precision: Literal["no", "bf16"] = "bf16" if target.precision == "bf16" else "no"
    with _without_memory(grafted, target), softmax_by_document(grafted, precision) as by_document:
        if config.accumulation > 1:  # gradients of the micro-batches before
            for parameter in stage.trainable().values():
                parameter.grad = torch.empty_like(parameter)
        gradients = [p.grad for p in stage.trainable().values() if p.grad is not None]
        with LiveMemory(gradients) as memory, mixed:
            ids_BT = torch.zeros(rows, length, dtype=torch.long)
            targets_BT = torch.zeros(rows, length, dtype=torch.bool)
            starts_S = torch.zeros(rows + 1, dtype=torch.int32) if by_document else None
            batch = Batch(ids_BT, ids_BT.clone(), ids_BT.clone(), targets_BT, starts_S=starts_S)
            stage.train_micro_batch(batch, lambda loss: loss.backward())
        return memory.at_peak


@contextmanager
def _without_memory(grafted: Graft, target: Target) -> Iterator[None]:
    """Inside, the models' tensors are ones of the CPU that have no memory, and operations run as on the target.

    Tensors of the meta device would not do: autocast and attention choose by the kind of device.
    """
    mode = FakeTensorMode()
    made: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []

    def without_memory(x: Tensor) -> Tensor:
        if id(x) not in made:
            fake = FakeTensor(mode, x.detach(), torch.device("cpu"))
            made[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
        return made[id(x)]

    for model in {id(grafted.model): grafted.model, id(grafted.observed.model): grafted.observed.model}.values():
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, x in table.items():
                    if x is not None:
                        before.append((table, name, x))
                        table[name] = without_memory(x)
    try:
        with mode, backend.standing_for(target.device):
            yield
    finally:
        for table, name, x in before:
            table[name] = x
