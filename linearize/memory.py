"""The memory that training takes, predicted: from a configuration alone, on a machine without the device.

What lives all the time is counted: weights, mixers, adapters, AdamW's moments, buffers of streamed layers. What comes
and goes is traced: one micro-batch of the very stage runs on tensors that have shapes and no memory, and every storage
is followed from its making to its end. Decoders are traced at two small depths; what grows with depth, grows linearly.

Of several processes, the one that needs most is predicted. The trace runs its part of the very engine: FSDP2 gathers
shards and looks ahead, a relay of layers receives and hands on, and only the exchange itself is left out.

Not seen: work space within an operation, and what CUDA and NCCL take beside torch's allocator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedConfig

from linearize.distributed import Processes, Split, buckets, share_of_layers
from linearize.families import FAMILIES, has_experts
from linearize.live_memory import BLOCK, LiveMemory
from linearize.machine import DTYPES, Precision
from linearize.packed import softmax_by_document
from linearize.pretended import pretended
from linearize.recipe import Recipe
from linearize.relay import Relay
from linearize.sharding import shard_layers_over
from linearize.stages import Batch, Stage, StageConfig, build_stage, check_sizes, check_stages
from linearize.surgery import EveryNth, Graft, graft, plan_surgery, with_frozen_teacher
from linearize.teacher import choose_attention
from linearize_kernels import backend

CUBLAS_BYTES = 2 * 32 * 2**20
"""Work space that torch gives cuBLAS on Hopper: 32 MiB for each thread that multiplies, forward's and backward's."""


@dataclass(frozen=True)
class Target:
    """Where training would run.

    `streamed`: frozen layers lie in host memory, but for the one that computes and the next. With several `processes`,
    each on a device of its own, they `split` the work.
    """

    device: Literal["cpu", "cuda"] = "cuda"
    precision: Precision = "bf16"
    streamed: bool = False
    processes: int = 1
    split: Split = "data"

    def by_layers(self, config: StageConfig) -> bool:
        """Whether each process trains layers of its own in this stage."""
        return self.split == "layers" and config.layers_train_alone

    def parts(self, stage: Stage, index: int) -> list[tuple[int, ...]]:
        """The student layers of every process."""
        return share_of_layers(list(stage.by_layer()), Processes(0, self.processes), index)


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
    "exchange": "buffer of gradients on their way",
}
"""Terms of what lives at the peak and was made during the step."""


def predict_memory(config: PreTrainedConfig, recipe: Recipe, target: Target) -> list[StageMemory]:
    """Predict every stage of a recipe, for a teacher that need not exist.

    Args:
        config: the teacher's.
        recipe: how to convert, with micro-batches that the processes can share (`share_rows`); its stages come one
            after the other, adapters stay.
        target: device, precision, whether layers are streamed, and how many processes share the work.

    Raises:
        LinearizeError: as the conversion would, for the surgery and the recipe.
    """
    whole = _build(config, recipe, target, config.num_hidden_layers)
    found = []
    for index, stage_config in enumerate(recipe.stages):
        stage = build_stage(stage_config, whole)
        peaks = _peaks(config, recipe, target, index) | _exchange(stage, stage_config, target)
        where, at_peak = max(peaks.items(), key=lambda item: sum(item[1].values()))
        terms = _resident(stage, whole, target, index) | {MADE_IN[made]: size for made, size in at_peak.items()}
        present = {name: size for name, size in terms.items() if size > 0}
        found.append(StageMemory(stage_config.kind, present, where or "batch"))
    return found


def unpredictable(config: PreTrainedConfig, target: Target) -> str:
    """Why the memory of such a teacher cannot be predicted; empty where it can.

    Experts in fp32 pick their rows by what is in them, and tensors without memory have nothing in them.
    """
    fp32_experts = has_experts(config) and target.precision == "fp32"
    return "experts in fp32 cannot be traced without computing" if fp32_experts else ""


Peaks = dict[str, dict[str, int]]
"""Of each part of a step, what lives at its own peak, by the part that made it."""


def _peaks(config: PreTrainedConfig, recipe: Recipe, target: Target, index: int) -> Peaks:
    """Of a micro-batch of one stage: of the whole depth, on the process that needs most."""
    traced = partial(_trace, config, recipe, target, index)
    depth: int = config.num_hidden_layers
    if target.by_layers(recipe.stages[index]):  # a process runs a few layers; the last one has most, but sends nothing
        found = [traced(depth, rank) for rank in (target.processes - 2, target.processes - 1)]
        return max(found, key=lambda peaks: max(sum(at_peak.values()) for at_peak in peaks.values()))
    small, large = _depths(config, recipe)
    return traced(small) if small == large else _deepen(traced(small), traced(large), (small, large, depth))


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


def _resident(stage: Stage, grafted: Graft, target: Target, index: int) -> dict[str, int]:
    """What lives during the whole of a stage."""
    frozen_teacher = 0 if grafted.teacher is None else _size(grafted.observed.model.parameters())
    adapters = _size(p for name, p in grafted.model.named_parameters() if ".lora_" in name)
    mixers = _size(grafted.mixer_parameters().values())
    return _base_weights(grafted, target) | {
        "frozen teacher": frozen_teacher,
        "mixers": mixers,
        "adapters": adapters,
        "AdamW moments": 2 * max(_size(own.values()) for own in _trained(stage, target, index)),
        "hidden states not yet taken, at most": _waiting(grafted, stage.config, target),
        "cuBLAS work space": CUBLAS_BYTES if target.device == "cuda" else 0,
    }


def _base_weights(grafted: Graft, target: Target) -> dict[str, int]:
    """Those that are on the device: all, two layers of them, or shards."""
    every = _base(grafted.model)
    layers = [_base(layer) for layer in grafted.decoder_layers]
    sizes = [_size(layer) for layer in layers]
    beside = {"weights beside the layers": _size(every) - sum(sizes)}
    if target.streamed:
        return beside | {"two streamed layers": 2 * max(sizes)}
    if target.split == "fsdp":
        return beside | {"shards of the layers": sum(_shards(layer, target.processes) for layer in layers)}
    return {"base weights": _size(every)}


def _base(module: nn.Module) -> list[nn.Parameter]:
    """The teacher's own weights in it."""
    return [p for name, p in module.named_parameters() if ".mixer." not in name and ".lora_" not in name]


def _shards(layer: Sequence[Tensor], count: int) -> int:
    """Bytes that one of `count` processes keeps: FSDP2 cuts the first dimension into equal parts, and fills up."""
    return _size(p.new_empty(-(-len(p) // count), *p.shape[1:]) for p in layer)


def _trained(stage: Stage, target: Target, index: int) -> list[dict[str, nn.Parameter]]:
    """The parameters that each process trains."""
    trained = dict(stage.trainable())
    if not target.by_layers(stage.config):
        return [trained] * target.processes
    layers = stage.by_layer()
    return [{name: trained[name] for layer in part for name in layers[layer]} for part in target.parts(stage, index)]


def _waiting(grafted: Graft, config: StageConfig, target: Target) -> int:
    """Hidden states that were handed on: a process keeps each until the next one has taken it, a step's at most."""
    if not target.by_layers(config):
        return 0
    width: int = grafted.model.config.hidden_size
    numbers = min(config.micro_batch, config.batch) * config.length * width
    return config.accumulation * numbers * DTYPES[target.precision].itemsize


def _exchange(stage: Stage, config: StageConfig, target: Target) -> Peaks:
    """A step's end, where processes add up their gradients: all of them, and the largest flat buffer (`add_up`)."""
    if target.processes == 1 or target.by_layers(config):
        return {}
    gradients = list(stage.trainable().values())
    flat = max(sum(p.numel() * p.element_size() for p in bucket) for bucket in buckets(gradients))
    return {"exchange": {"backward": _size(gradients), "exchange": flat}}


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes, as the allocator rounds them; each tensor once."""
    once = {id(x): x for x in tensors}.values()
    return sum(-(-x.numel() * x.element_size() // BLOCK) * BLOCK for x in once)


def _trace(config: PreTrainedConfig, recipe: Recipe, target: Target, index: int, layers: int, rank: int = 0) -> Peaks:
    """One micro-batch of a stage, with so many layers, on one process."""
    grafted = _build(config, recipe, target, layers)
    for earlier in recipe.stages[:index]:
        build_stage(earlier, grafted)  # its adapters stay, and what it made fp32
    stage_config = recipe.stages[index]
    if target.streamed and "checkpoint_activations" in type(stage_config).model_fields:
        stage_config = stage_config.model_copy(update={"checkpoint_activations": True})
    grafted.model.requires_grad_(False)
    stage = build_stage(stage_config, grafted)
    own = _trained(stage, target, index)[rank]
    for parameter in own.values():
        parameter.requires_grad_(True)
    with nullcontext() if target.processes == 1 else pretended(rank, target.processes):
        if target.by_layers(stage_config):
            parts = target.parts(stage, index)
            relay = Relay(parts, Processes(rank, target.processes), stage_config.accumulation)
            stage.take_layers(parts[rank], relay.own_layers)
        return _trace_stage(stage, list(own), grafted, target)


def _trace_stage(stage: Stage, own: Sequence[str], grafted: Graft, target: Target) -> Peaks:
    """One micro-batch of a stage that trains its `own` parameters."""
    config = stage.config
    rows, length = min(config.micro_batch, config.batch), config.length
    mixed = torch.autocast("cpu", torch.bfloat16) if target.precision == "bf16" else nullcontext()
    precision: Literal["no", "bf16"] = "bf16" if target.precision == "bf16" else "no"
    accumulated = config.accumulation // (1 if target.by_layers(config) else target.processes)
    with _without_memory(grafted, target), softmax_by_document(grafted, precision) as by_document:
        trained = stage.trainable()
        if accumulated > 1:  # gradients of the micro-batches before
            for name in own:
                trained[name].grad = torch.empty_like(trained[name])
        gradients = [p.grad for p in trained.values() if p.grad is not None]
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
    mesh = None
    if target.split == "fsdp":
        # made out here, for its numbers are read; named, for torch's caches take a real mesh of that size for it
        mesh = init_device_mesh("cpu", (target.processes,), mesh_dim_names=("pretended",))
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
            if mesh is not None:
                shard_layers_over(mesh, grafted.model)
            yield
    finally:
        for table, name, x in before:
            table[name] = x
