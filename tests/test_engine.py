"""What the engine costs: host synchronisations, batches made ahead, and what memory holds at one time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from linearize.adapters import LoraSettings, lora_layers
from linearize.data.prefetch import MadeAhead
from linearize.errors import RunError
from linearize.live_memory import LiveMemory
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.stages import Batch, Stage, StageConfig, build_stage, distil
from linearize.stages.base import run_trunk, softmax_mask
from linearize.stages.distil import Distil, DistilConfig
from linearize.stages.transfer import TransferConfig
from linearize.streaming import stream_layers
from linearize.surgery import Graft, graft, plan_surgery

MakeTeacher = Callable[..., PreTrainedModel]
STAGES = [TransferConfig(tokens=1), DistilConfig(tokens=1, kl=0.5, ce=0.5)]


class Synchronisations(TorchDispatchMode):
    """Operations after which a GPU's host would wait: they give Python a number or a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def one_document(batch: Batch) -> Batch:
    positions_BT = torch.arange(batch.input_ids_BT.shape[1]).expand_as(batch.input_ids_BT)
    targets_BT = torch.ones_like(batch.target_mask_BT)
    targets_BT[:, -1] = False
    return Batch(batch.input_ids_BT, positions_BT, None, targets_BT)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one-document"])
@pytest.mark.parametrize("config", STAGES, ids=lambda config: config.kind)
def test_how_often_a_micro_batch_waits_for_the_device(
    make_teacher: MakeTeacher, packed_batch: Batch, config: StageConfig, packed: bool
) -> None:
    model = make_teacher()
    stage = build_stage(config, graft(model, plan_surgery(model, HedgehogConfig(), (1,))))
    for parameter in stage.trainable().values():
        parameter.requires_grad_(True)
    with Synchronisations() as found:
        stage.train_micro_batch(packed_batch if packed else one_document(packed_batch), lambda loss: loss.backward())
    # transformers looks for documents in positions once a pass, where no mask says it; teacher and student pass
    passes = {"transfer": 1, "distil": 2}[config.kind]
    assert len(found.seen) == (0 if packed else passes)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one-document"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_teacher_sees_what_transformers_would_let_it_see(
    make_teacher: MakeTeacher, packed_batch: Batch, packed: bool, attention: str
) -> None:
    """To the last bit, whoever makes the mask."""
    batch = packed_batch if packed else one_document(packed_batch)
    model = make_teacher(attn_implementation=attention)
    with torch.no_grad():
        expected = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        grafted = graft(model, plan_surgery(model, HedgehogConfig(), (1,)))
        with grafted.as_teacher() as teacher:
            found = run_trunk(teacher, batch, softmax_mask(teacher, batch))
    assert torch.equal(found, expected.last_hidden_state)


class Counted:
    """Micro-batches that note which thread made which of them."""

    def __init__(self, batch: Batch, size: int, broken: int = -1) -> None:
        self.batch, self.size, self.broken = batch, size, broken
        self.made: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        self.made.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.broken:
            raise ArithmeticError(index)
        return Batch(torch.full((1, 2), index), self.batch.position_ids_BT, None, self.batch.target_mask_BT)


def numbers(batches: MadeAhead, indices: range) -> list[int]:
    return [int(batches[index].input_ids_BT[0, 0]) for index in indices]


def test_batches_are_made_once_in_order_and_elsewhere(packed_batch: Batch) -> None:
    source = Counted(packed_batch, 7)
    with MadeAhead(source, torch.device("cpu")) as ahead:
        assert len(ahead) == 7
        assert numbers(ahead, range(3, 7)) == [3, 4, 5, 6]
        assert source.made == [3, 4, 5, 6]
        assert numbers(ahead, range(2)) == [0, 1]  # another order is as right, only not ahead
    assert threading.current_thread().name not in source.threads
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_a_batch_that_fails_fails_where_it_is_used(packed_batch: Batch) -> None:
    with MadeAhead(Counted(packed_batch, 4, broken=2), torch.device("cpu")) as ahead:
        assert numbers(ahead, range(2)) == [0, 1]
        with pytest.raises(ArithmeticError, match="2"):
            ahead[2]


def test_a_micro_batch_that_does_not_exist(packed_batch: Batch) -> None:
    with MadeAhead([packed_batch], torch.device("cpu")) as ahead, pytest.raises(IndexError):
        ahead[1]


# ------------------------------------------------------------------------------------------ recomputing and streaming


def gradients_of(stage: Stage, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one micro-batch; the stage trains for no longer than this."""
    trained = stage.trainable()
    for parameter in trained.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    torch.manual_seed(7)
    metrics = stage.train_micro_batch(batch, lambda loss: loss.backward())
    found = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    assert found.keys() == trained.keys()
    return {name: value.item() for name, value in metrics.items()}, found


def assert_same(
    one: tuple[dict[str, float], dict[str, Tensor]], two: tuple[dict[str, float], dict[str, Tensor]]
) -> None:
    assert one[0] == two[0]
    for name, gradient in one[1].items():
        assert torch.equal(gradient, two[1][name]), name


def make_graft(make_teacher: MakeTeacher, streamed: bool = False, **overrides: Any) -> Graft:
    model = make_teacher(num_hidden_layers=5, **overrides)
    stream = stream_layers(model, torch.device("cpu")) if streamed else None
    return replace(graft(model, plan_surgery(model, HedgehogConfig(), (1,))), stream=stream)


ADAPTERS = LoraSettings(dropout=0.2, targets=("q_proj", "o_proj", "down_proj"))


def test_recomputing_changes_no_bit(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    """Dropout included; and the model is as it was."""
    found = []
    for asked in (False, True):
        torch.manual_seed(1)
        grafted = make_graft(make_teacher)
        stage = build_stage(DistilConfig(tokens=1, checkpoint_activations=asked, lora=ADAPTERS), grafted)
        modes = {name: module.training for name, module in grafted.model.named_modules()}
        found.append(gradients_of(stage, packed_batch))
        assert modes == {name: module.training for name, module in grafted.model.named_modules()}
    assert_same(*found)


class Kept:
    """Bytes that a forward pass keeps for its backward pass, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def test_recomputing_keeps_the_inputs_of_layers_alone(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    sizes = []
    for asked in (False, True):
        grafted = make_graft(make_teacher)
        stage = build_stage(DistilConfig(tokens=1, checkpoint_activations=asked), grafted)
        for parameter in stage.trainable().values():
            parameter.requires_grad_(True)
        assert isinstance(stage, Distil)
        with Kept() as kept, stage._recompute():
            run_trunk(grafted.model, packed_batch)
        sizes.append(sum(kept.storages.values()))
    assert sizes[1] < sizes[0] / 10


@pytest.mark.parametrize(
    "config", [TransferConfig(tokens=1), DistilConfig(tokens=1, lora=ADAPTERS)], ids=["transfer", "distil"]
)
def test_streamed_layers_give_the_same_bits(
    make_teacher: MakeTeacher, packed_batch: Batch, config: StageConfig
) -> None:
    found = []
    for streamed in (False, True):
        torch.manual_seed(1)
        grafted = make_graft(make_teacher, streamed)
        stage = build_stage(config, grafted)
        found.append([gradients_of(stage, packed_batch) for _ in range(2)][1])
    for once, again in zip(*found, strict=True):
        assert once.keys() == again.keys()
    assert_same(*found)


def test_a_layer_is_on_the_device_when_it_computes(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    """Two layers' worth of the device; one copy a layer and pass, up through the layers and down again."""
    grafted = make_graft(make_teacher, streamed=True)
    stream = grafted.stream
    assert stream is not None
    inside = [(slot.buffer.data_ptr(), slot.buffer.data_ptr() + slot.buffer.numel()) for slot in stream._slots]
    layer_bytes = sum(p.numel() * 4 for p in make_teacher().model.layers[0].parameters())
    assert 2 * layer_bytes <= stream.slot_bytes < 2.1 * layer_bytes
    seen: list[int] = []

    def check(index: int, layer: nn.Module, *_: Any) -> None:
        seen.append(index)
        for name, parameter in layer.named_parameters():
            on_device = any(low <= parameter.data_ptr() < high for low, high in inside)
            assert not inside or on_device == (".mixer." not in name and ".lora_" not in name), name

    stage = build_stage(DistilConfig(tokens=1), grafted)
    for index, layer in enumerate(grafted.decoder_layers):
        layer.mlp.register_forward_pre_hook(partial(check, index))  # below what is recomputed: runs each time
        for name in ("q_proj", "o_proj") if index else ():  # nothing below layer 0 wants a gradient
            layer.self_attn.get_submodule(name).register_full_backward_hook(
                lambda *_, i=index, own=layer: check(i, own.mlp)
            )
    gradients_of(stage, packed_batch)
    assert set(seen) == set(range(5))
    passes = 3  # of the teacher, of the student, and the student's again
    assert stream.copies <= 5 * passes
    before = stream.copies
    slots = tuple(inside)
    inside.clear()
    stream.close()
    frozen = [p for layer in grafted.decoder_layers for n, p in layer.named_parameters() if ".mixer." not in n]
    assert not any(low <= p.data_ptr() < high for p in frozen for low, high in slots)
    with torch.no_grad():
        run_trunk(grafted.model, packed_batch)
    assert stream.copies == before


def test_streamed_layers_are_recomputed_or_refused(make_teacher: MakeTeacher) -> None:
    grafted = make_graft(make_teacher, streamed=True)
    with pytest.raises(RunError, match=r"checkpoint_activations: false: streamed layers .* recomputed"):
        build_stage(DistilConfig(tokens=1, checkpoint_activations=False), grafted)


def test_transfer_holds_one_layers_activations(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    """What lives after a layer's backward pass, beside gradients and results, does not grow with the layers."""
    peaks = []
    for layers in (2, 6):
        model = make_teacher(num_hidden_layers=layers)
        stage = build_stage(TransferConfig(tokens=1), graft(model, plan_surgery(model, HedgehogConfig())))
        gradients_of(stage, packed_batch)  # so that gradients exist already
        with LiveMemory() as memory:
            stage.train_micro_batch(packed_batch, lambda loss: loss.backward())
        peaks.append(memory.peak)
    assert peaks[1] < 1.01 * peaks[0]


def test_adapters_read_bf16_inputs_as_they_are(
    make_teacher: MakeTeacher, packed_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as with peft's detour over fp32, and less is kept; outside, peft widens as it did."""
    found, sizes = [], []
    for detour in (True, False):
        if detour:
            monkeypatch.setattr(distil, "inputs_uncast", lambda *_: nullcontext())
        else:
            monkeypatch.undo()
        torch.manual_seed(1)
        model = make_teacher().bfloat16()
        grafted = graft(model, plan_surgery(model, HedgehogConfig()))
        stage = build_stage(DistilConfig(tokens=1), grafted)
        with torch.autocast("cpu", torch.bfloat16), Kept() as kept:
            found.append(gradients_of(stage, packed_batch))
        sizes.append(sum(kept.storages.values()))
        assert all(layer.cast_input_dtype_enabled for layer in lora_layers(model))
    assert_same(*found)
    assert sizes[1] < sizes[0]
