"""Models whose frozen weights are sharded over processes from the start: no device ever holds them whole.

The main process reads a model into host memory. The others get it without its weights, by value, so that buffers, ties
and dtypes are the main one's. From there all do the same: decoder layers are sharded with FSDP2 while they hold
nothing, and each weight is sent once, of which a process keeps its part. The most a device holds are its shards, what
stays whole, and one weight more.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from linearize.adapters import lora_parameters
from linearize.attention import StudentAttention
from linearize.distributed import Processes, send_from
from linearize.errors import RunError
from linearize.export import load_student
from linearize.machine import memory_bytes
from linearize.quantized import is_quantized
from linearize.surgery import decoder_layers, trunk_of
from linearize.teacher import Teacher, load_teacher
from linearize.teacher_files import Checkpoint

log = logging.getLogger(__name__)

ROOMY = 16
"""A GPU that holds the weights so many times gains little by sharding them: at most 6 % of its memory becomes free. And
it may wait for the host, which launches what a split by data replays from CUDA graphs.
"""


def load_sharded_teacher(
    model: str | Checkpoint, dtype: torch.dtype, device: torch.device, processes: Processes
) -> Teacher:
    """`load_teacher` on the main process, whose weights all processes then share.

    Raises:
        TeacherError: as `load_teacher`, on the main process; MainFailed on the others.
    """
    whole: list[Teacher] = []  # not what is returned: that goes to all processes
    processes.on_main(lambda: whole.append(load_teacher(model, dtype=dtype, device=device, in_host_memory=True)))
    teacher = processes.on_main(lambda: replace(whole[0], model=without_weights(whole[0].model)))
    _share_weights(teacher.model, [read.model for read in whole], device, processes)
    if processes.main and needless(teacher.model, device):
        log.warning(needless(teacher.model, device))
    return teacher


def load_sharded_student(folder: Path, device: torch.device, processes: Processes) -> PreTrainedModel:
    """`load_student` on the main process, whose weights all processes then share.

    Raises:
        RunError: as `load_student`, on the main process; MainFailed on the others.
    """
    whole: list[PreTrainedModel] = []  # as above
    processes.on_main(lambda: whole.append(load_student(folder)))
    student = processes.on_main(lambda: without_weights(whole[0]))
    _share_weights(student, whole, device, processes)
    return student


def needless(model: PreTrainedModel, device: torch.device) -> str:
    """What to tell who shards weights that the GPU holds many times over; empty for larger ones, and on a CPU."""
    weights, memory = sum(p.numel() * p.element_size() for p in model.parameters()), memory_bytes(device)
    if device.type != "cuda" or weights * ROOMY > memory:
        return ""
    return (
        f"--split fsdp: this GPU would hold the weights ({weights / 2**30:.2g} GiB) {memory // weights} times. "
        "Sharding them frees little and makes it wait for the host; `--split data` is faster."
    )


def shard_layers(model: PreTrainedModel, device: torch.device, processes: Processes) -> None:
    """Shard the frozen weights of every decoder layer (FSDP2); mixers, embeddings, last norm and head stay whole.

    A layer's weights are gathered while it computes. What surgery puts into it later, and adapters, stay whole too:
    what trains is small, and its gradients are exchanged like everywhere else.

    Raises:
        RunError: the weights are quantised, in formats that FSDP2 cannot cut.
    """
    if is_quantized(model):
        raise RunError(
            "quantised weights cannot be sharded",
            place="--split fsdp",
            remedy="Use `--split data`, or leave --quantize out.",
        )
    shard_layers_over(init_device_mesh(device.type, (processes.count,)), model)


def shard_layers_over(mesh: DeviceMesh, model: PreTrainedModel) -> None:
    """`shard_layers` over processes that have met already."""
    trunk = trunk_of(model)
    students = (module for module in model.modules() if isinstance(module, StudentAttention))
    small = {parameter for student in students for parameter in student.mixer.parameters()}
    small |= set(lora_parameters(model).values())
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=small)
    fully_shard(trunk, mesh=mesh, ignored_params=set(trunk.parameters()))


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters are frozen, on the meta device, and tied where the model's are; buffers hold the same."""
    bare = {id(held): nn.Parameter(held.detach().to("meta"), requires_grad=False) for held in model.parameters()}
    return copy.deepcopy(model, bare)


def free_weights(model: nn.Module) -> None:
    """Give the memory of all parameters back, whatever still refers to them; the model cannot be used again."""
    for parameter in model.parameters():
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        held.untyped_storage().resize_(0)


@torch.no_grad()
def _share_weights(
    model: PreTrainedModel, whole: list[PreTrainedModel], device: torch.device, processes: Processes
) -> None:
    """Shard a model without weights, and give it those of `whole`, which holds one model on the main process."""
    shard_layers(model, device, processes)
    _make_room(model, device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        weights = decoder_layers(whole[0])[index].state_dict() if processes.main else {}
        set_model_state_dict(layer, weights, options=options)  # sends one weight at a time; a missing one is an error
    inside = {id(parameter) for parameter in layers.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            if processes.main:
                parameter.copy_(whole[0].get_parameter(name))
            send_from(0, [parameter])


def _make_room(model: PreTrainedModel, device: torch.device) -> None:
    """Give parameters memory on the device, and bring the buffers there: `to_empty` forgets both values and ties."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
