"""Stages against plain implementations: the same losses, the same gradients, and gradients nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.adapters import LoraSettings, add_lora, lora_layers, lora_off, lora_parameters, merge_lora
from linearize.errors import RecipeError
from linearize.mixers import HeadInputs, Rope
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.stages import STAGES, Batch, Stage, build_stage
from linearize.stages.distil import DistilConfig
from linearize.stages.transfer import TransferConfig
from linearize.surgery import Graft, KeepSoftmax, graft, plan_surgery

MakeTeacher = Callable[..., PreTrainedModel]


def grafted_from(make_teacher: MakeTeacher, keep: KeepSoftmax = "none", **overrides: Any) -> Graft:
    """With mixers moved off their start."""
    model = make_teacher(**overrides)
    grafted = graft(model, plan_surgery(model, HedgehogConfig(), keep))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in grafted.mixer_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.requires_grad_(False)
    return grafted


def stir(model: PreTrainedModel) -> None:
    """Give the adapters an effect; they start as no change."""
    torch.manual_seed(4)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)


def run(stage: Stage, batch: Batch, model: PreTrainedModel) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One micro-batch as `fit` runs it: metrics, and every gradient in the model."""
    model.requires_grad_(False)
    for parameter in stage.trainable().values():
        parameter.requires_grad_(True)
    metrics = stage.train_micro_batch(batch, lambda loss: loss.backward())
    assert not any(value.requires_grad for value in metrics.values())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in metrics.items()}, gradients


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def plain_layer_losses(grafted: Graft, original: PreTrainedModel, batch: Batch) -> list[dict[str, Tensor]]:
    """Run the original with hooks, then each mixer on what its layer saw, and compare by definition."""
    seen: dict[int, dict[str, Tensor]] = {layer: {} for layer in grafted.students}
    for layer, kept in seen.items():
        attention = original.model.layers[layer].self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.get_submodule(name).register_forward_hook(
                lambda _module, args, result, kept=kept, name=name: kept.update({name: result, "x": args[0]})
            )
        attention.o_proj.register_forward_pre_hook(lambda _module, args, kept=kept: kept.update(mixed=args[0]))
    with torch.no_grad():
        original(batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        cos, sin = original.model.rotary_emb(batch.input_ids_BT.float(), batch.position_ids_BT)
    assert batch.segments_BT is not None
    seen_BTT = (batch.segments_BT[:, :, None] == batch.segments_BT[:, None]).tril()[:, None]
    losses = []
    for layer, kept in seen.items():
        q, k, v = (kept[name].unflatten(-1, (-1, 16)) for name in ("q_proj", "k_proj", "v_proj"))
        rope = Rope(cos, sin)
        heads = HeadInputs(kept["x"], q, k, v, rope=rope, segments_BT=batch.segments_BT)
        mixed, wanted = grafted.students[layer].mixer(heads)[0], kept["mixed"].unflatten(-1, (4, 16))
        k_BTHK = rope.rotate(k).repeat_interleave(2, 2)
        score = torch.einsum("bihk,bjhk->bhij", rope.rotate(q), k_BTHK) / 16**0.5
        target = score.masked_fill(~seen_BTT, float("-inf")).softmax(-1)
        weight = grafted.students[layer].mixer.row_weights(heads)(0, batch.input_ids_BT.shape[1])
        cross_entropy = -torch.where(seen_BTT, target * weight.clamp_min(1e-12).log(), 0).sum(-1).mean()
        error = ((mixed - wanted) ** 2).sum() / (wanted**2).sum()
        losses.append({"mse": F.mse_loss(mixed, wanted), "relative_mse": error, "attention_ce": cross_entropy})
    return losses


@pytest.mark.parametrize("keep", ["none", (1,)])
@pytest.mark.parametrize(
    "objective", [{"relative_mse": 1.0}, {"mse": 2.0}, {"attention_ce": 1.0}, {"mse": 0.5, "attention_ce": 0.1}]
)
def test_transfer_equals_a_plain_implementation(
    make_teacher: MakeTeacher, packed_batch: Batch, keep: KeepSoftmax, objective: dict[str, float]
) -> None:
    grafted, original = grafted_from(make_teacher, keep), make_teacher()
    losses = plain_layer_losses(grafted, original, packed_batch)
    terms = [sum(weight * loss[name] for name, weight in objective.items()) for loss in losses]
    total = torch.stack(terms).mean()  # type: ignore[arg-type]
    mixers = grafted.mixer_parameters()
    for parameter in mixers.values():
        parameter.requires_grad_(True)
    losses = plain_layer_losses(grafted, make_teacher(), packed_batch)
    terms = [sum(weight * loss[name] for name, weight in objective.items()) for loss in losses]
    expected = torch.autograd.grad(torch.stack(terms).mean(), list(mixers.values()))  # type: ignore[arg-type]

    stage = build_stage(TransferConfig(tokens=1, objective=objective), grafted)
    metrics, gradients = run(stage, packed_batch, grafted.model)
    same_gradients(gradients, dict(zip(mixers, expected, strict=True)))
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    for layer, loss in zip(grafted.students, losses, strict=True):
        assert metrics[f"error/layer_{layer:02d}"] == pytest.approx(loss["relative_mse"].item(), rel=1e-4)
    assert metrics["error"] == pytest.approx(
        sum(loss["relative_mse"].item() for loss in losses) / len(losses), rel=1e-4
    )


def test_transfer_hands_each_layer_to_backward_alone(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    grafted = grafted_from(make_teacher)
    stage, calls = build_stage(TransferConfig(tokens=1), grafted), []
    for parameter in stage.trainable().values():
        parameter.requires_grad_(True)
    metrics = stage.train_micro_batch(packed_batch, lambda loss: calls.append(loss.item()))
    assert len(calls) == 3
    assert sum(calls) == pytest.approx(metrics["loss"].item(), rel=1e-5)


def test_transfer_leaves_the_model_as_it_was(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    grafted = grafted_from(make_teacher)
    stage = build_stage(TransferConfig(tokens=1), grafted)

    def fails(_loss: Tensor) -> None:
        raise ArithmeticError

    for parameter in stage.trainable().values():
        parameter.requires_grad_(True)
    with pytest.raises(ArithmeticError):
        stage.train_micro_batch(packed_batch, fails)
    assert all(student.observer is None and student.mode == "student" for student in grafted.students.values())
    assert not any(module._forward_hooks for module in grafted.model.modules())
    assert not any(m._forward_pre_hooks for m in grafted.model.modules() if m is not grafted.trunk)


def test_transfer_sees_the_teacher_without_its_adapters(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    """A later transfer stage, after one that trained LoRA: targets are the teacher's, not the adapted ones."""
    grafted = grafted_from(make_teacher)
    before, _ = run(build_stage(TransferConfig(tokens=1), grafted), packed_batch, grafted.model)
    add_lora(grafted.model, LoraSettings())
    stir(grafted.model)
    after, gradients = run(build_stage(TransferConfig(tokens=1), grafted), packed_batch, grafted.model)
    assert before == after
    assert all(".mixer." in name for name in gradients)


def plain_distillation(student: PreTrainedModel, original: PreTrainedModel, batch: Batch, c: DistilConfig) -> Tensor:
    asked = {"position_ids": batch.position_ids_BT, "use_cache": False}
    with torch.no_grad():
        teacher = original(batch.input_ids_BT, **asked).logits[:, :-1][batch.target_mask_BT[:, :-1]]
    logits = student(batch.input_ids_BT, **asked).logits[:, :-1][batch.target_mask_BT[:, :-1]]
    targets = batch.input_ids_BT[:, 1:][batch.target_mask_BT[:, :-1]]
    log_p, log_q = (F.log_softmax(x / c.temperature, -1) for x in (teacher, logits))
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * c.temperature**2
    return c.kl * kl + c.ce * F.cross_entropy(logits, targets)


@pytest.mark.parametrize("keep", ["none", (1,)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl": 0.0, "ce": 1.0},
        {"kl": 0.7, "ce": 0.2, "temperature": 2.0},
        {"train_mixers": False, "lora": {"r": 2, "targets": ("q_proj", "o_proj", "down_proj")}},
        {"lora": None},
    ],
)
def test_distillation_equals_a_plain_implementation(
    make_teacher: MakeTeacher, packed_batch: Batch, keep: KeepSoftmax, options: dict[str, Any]
) -> None:
    config = DistilConfig(tokens=1, **options)
    grafted = grafted_from(make_teacher, keep)
    stage = build_stage(config, grafted)
    stir(grafted.model)
    plain = copy.deepcopy(grafted.model)
    metrics, gradients = run(stage, packed_batch, grafted.model)
    names = set(stage.trainable())
    assert any(".mixer." in name for name in names) == config.train_mixers
    assert any(".lora_A." in name for name in names) == (config.lora is not None)
    for name in names:
        plain.get_parameter(name).requires_grad_(True)
    expected = plain_distillation(plain, make_teacher(), packed_batch, config)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(config.kl * metrics["kl"] + config.ce * metrics["ce"], rel=1e-5)
    same_gradients(gradients, {name: plain.get_parameter(name).grad for name in names})  # type: ignore[misc]


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


def test_every_stage_is_named_as_in_the_table(make_teacher: MakeTeacher) -> None:
    grafted = grafted_from(make_teacher)
    for kind, entry in STAGES.items():
        stage = build_stage(entry.config(tokens=1), grafted)  # type: ignore[call-arg]
        assert stage.name == stage.config.kind == kind
        assert set(stage.trainable()) <= {name for name, _ in grafted.model.named_parameters()}


@pytest.mark.parametrize(
    ("budget", "steps", "accumulation"),
    [
        ({"tokens": 8_000, "length": 100, "batch": 8, "micro_batch": 8}, 10, 1),
        ({"tokens": 8_799, "length": 100, "batch": 8, "micro_batch": 2}, 10, 4),
        ({"tokens": 799, "length": 100, "batch": 8, "micro_batch": 8}, 0, 1),
        ({"tokens": 800, "length": 100, "batch": 2, "micro_batch": 8}, 4, 1),
    ],
)
def test_steps(budget: dict[str, int], steps: int, accumulation: int) -> None:
    config = TransferConfig(**budget)
    assert (config.steps, config.accumulation) == (steps, accumulation)
