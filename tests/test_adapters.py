"""LoRA: adapters start as no change, leave the teacher alone, go on over stages, and merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from linearize.adapters import LoraSettings, add_lora, lora_layers, lora_off, lora_parameters, merge_lora
from linearize.errors import RecipeError
from linearize.stages import Batch, build_stage
from linearize.stages.distil import DistilConfig
from linearize.stages.transfer import TransferConfig
from linearize.surgery import KeepSoftmax
from tests.grafts import MakeTeacher, grafted_from, run, stir


def test_adapters_drop_out_only_where_they_train(make_teacher: MakeTeacher) -> None:
    grafted = grafted_from(make_teacher)
    lora = LoraSettings(dropout=0.5)
    for config, drops in (
        (DistilConfig(tokens=1, lora=lora), True),
        (TransferConfig(tokens=1), False),
        (DistilConfig(tokens=1, train=("mixer",)), False),
    ):
        build_stage(config, grafted)
        dropouts = [module for module in grafted.model.modules() if isinstance(module, nn.Dropout)]
        assert len(dropouts) == 3 * 4
        assert all(dropout.training == drops for dropout in dropouts)


@pytest.mark.parametrize("keep", ["none", (1,)])
def test_the_teacher_does_not_move_while_lora_trains(
    make_teacher: MakeTeacher, packed_batch: Batch, keep: KeepSoftmax
) -> None:
    grafted, ids = grafted_from(make_teacher, keep), packed_batch.input_ids_BT
    base = {name: tensor.clone() for name, tensor in make_teacher().state_dict().items()}
    stage = build_stage(DistilConfig(tokens=1), grafted)
    optimizer = torch.optim.AdamW(stage.trainable().values(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        metrics, _ = run(stage, packed_batch, grafted.model)
        losses.append(metrics["loss"])
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad(), grafted.as_teacher() as teacher, lora_off(grafted.model):
        assert torch.equal(teacher(ids, use_cache=False).logits, make_teacher()(ids, use_cache=False).logits)
    merged = {name.replace(".base_layer", ""): tensor for name, tensor in grafted.model.state_dict().items()}
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("bias", [False, True])
def test_merging_changes_no_answer(make_teacher: MakeTeacher, packed_batch: Batch, bias: bool) -> None:
    grafted, ids = grafted_from(make_teacher, (1,), attention_bias=bias), packed_batch.input_ids_BT
    names = set(grafted.model.state_dict())
    add_lora(grafted.model, LoraSettings(r=3, alpha=7, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")))
    stir(grafted.model)
    with torch.no_grad():
        before = grafted.model(ids, use_cache=False).logits
        assert merge_lora(grafted.model) == 3 * 5
        after = grafted.model(ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert set(grafted.model.state_dict()) == names
    assert not lora_layers(grafted.model)
    assert merge_lora(grafted.model) == 0


def test_adapters_start_as_no_change_and_in_fp32(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    model, ids = make_teacher(), packed_batch.input_ids_BT
    before = model(ids, use_cache=False).logits
    add_lora(model, LoraSettings())
    assert torch.equal(model(ids, use_cache=False).logits, before)
    low = make_teacher().bfloat16()
    add_lora(low, LoraSettings())
    assert {parameter.dtype for parameter in lora_parameters(low).values()} == {torch.float32}
    assert low(ids, use_cache=False).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [("q_proj", "query"), ("lm_head",)])
def test_targets_that_cannot_be_adapted(make_teacher: MakeTeacher, targets: tuple[str, ...]) -> None:
    """The head is no target either: teacher and student share it, and its gradient is never computed."""
    model = make_teacher(tie_word_embeddings=True)
    with pytest.raises(
        RecipeError, match=rf"lora.targets: no projection is called {targets[-1]}; .* has .*q_proj"
    ) as e:
        add_lora(model, LoraSettings(targets=targets))
    assert "lm_head" not in str(e.value).partition("this model has")[2]
    assert not lora_layers(model)


def test_a_later_stage_goes_on_with_the_same_adapters(make_teacher: MakeTeacher) -> None:
    grafted = grafted_from(make_teacher)
    first = build_stage(DistilConfig(tokens=1), grafted)
    stir(grafted.model)
    kept = {name: parameter.clone() for name, parameter in first.trainable().items()}
    second = build_stage(DistilConfig(tokens=1), grafted)
    assert kept.keys() == second.trainable().keys()
    assert all(torch.equal(parameter, kept[name]) for name, parameter in second.trainable().items())


@pytest.mark.parametrize("other", [{"r": 4}, {"alpha": 3}, {"dropout": 0.5}, {"targets": ("q_proj",)}])
def test_a_later_stage_with_other_adapters_is_refused(make_teacher: MakeTeacher, other: dict[str, Any]) -> None:
    model = make_teacher()
    add_lora(model, LoraSettings())
    with pytest.raises(RecipeError, match="lora: the model has adapters of an earlier stage with other settings"):
        add_lora(model, LoraSettings(**other))
