"""What the engine costs: host synchronisations, batches made ahead, and what memory holds at one time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from linearize.data.prefetch import MadeAhead
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.stages import Batch, StageConfig, build_stage
from linearize.stages.base import run_trunk, softmax_mask
from linearize.stages.distil import DistilConfig
from linearize.stages.transfer import TransferConfig
from linearize.surgery import graft, plan_surgery

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
