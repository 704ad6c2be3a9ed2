"""Stages against plain implementations: the same losses, the same gradients, and gradients nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_families import tiny_teacher
from torch import Tensor
from transformers import PreTrainedModel

from linearize.adapters import LoraSettings, add_lora
from linearize.errors import RecipeError
from linearize.job import Conversion
from linearize.mixers import MIXERS, HeadInputs, MixerEntry, Rope
from linearize.stages import STAGES, Batch, build_stage, check_sizes
from linearize.stages.distil import DistilConfig
from linearize.stages.parts import Part
from linearize.stages.transfer import TransferConfig
from linearize.surgery import Graft, KeepSoftmax, graft, plan_surgery, trunk_of, with_frozen_teacher
from tests.grafts import MakeTeacher, Twin, TwinConfig, grafted_from, run, stir, with_moved_weights


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
        attention.o_proj.register_forward_hook(
            lambda _module, args, result, kept=kept: kept.update(mixed=args[0], answer=result)
        )
    with torch.no_grad():
        original(batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        cos, sin = original.model.rotary_emb(batch.input_ids_BT.float(), batch.position_ids_BT)
    assert batch.segments_BT is not None
    seen_BTT = (batch.segments_BT[:, :, None] == batch.segments_BT[:, None]).tril()[:, None]
    losses = []
    for layer, kept in seen.items():
        student, rope = grafted.students[layer], Rope(cos, sin)
        q, k, _ = (kept[name].unflatten(-1, (-1, 16)) for name in ("q_proj", "k_proj", "v_proj"))
        own = [student.get_submodule(name)(kept["x"]) for name in ("q_proj", "k_proj", "v_proj")]
        heads = HeadInputs(
            kept["x"], *(one.unflatten(-1, (-1, 16)) for one in own), rope=rope, segments_BT=batch.segments_BT
        )
        mixed, wanted = student.mixer(heads)[0], kept["mixed"].unflatten(-1, (4, 16))
        k_BTHK = rope.rotate(k).repeat_interleave(2, 2)
        score = torch.einsum("bihk,bjhk->bhij", rope.rotate(q), k_BTHK) / 16**0.5
        target = score.masked_fill(~seen_BTT, float("-inf")).softmax(-1)
        weight = student.mixer.row_weights(heads)(0, batch.input_ids_BT.shape[1])
        cross_entropy = -torch.where(seen_BTT, target * weight.clamp_min(1e-12).log(), 0).sum(-1).mean()
        error = ((mixed - wanted) ** 2).sum() / (wanted**2).sum()
        frobenius = torch.linalg.matrix_norm(target - weight, "fro").mean() / target.shape[-1] ** 0.5
        answers = student.get_submodule("o_proj")(mixed.flatten(2)), kept["answer"]
        losses.append(
            {
                "mse": F.mse_loss(mixed, wanted),
                "relative_mse": error,
                "attention_ce": cross_entropy,
                "matrix": frobenius,
                "hidden": (answers[0] - answers[1]).norm(dim=-1).mean(),
            }
        )
    return losses


OBJECTIVES_TRIED: list[dict[str, float]] = [
    {"relative_mse": 1.0},
    {"mse": 2.0},
    {"attention_ce": 1.0},
    {"matrix": 3.0},
    {"hidden": 1.0},
    {"mse": 0.5, "attention_ce": 0.1, "matrix": 0.2, "hidden": 0.3},
]


def check_transfer(grafted: Graft, original: PreTrainedModel, batch: Batch, config: TransferConfig) -> None:
    """Losses and gradients against the plain implementation."""
    stage = build_stage(config, grafted)
    trained = stage.trainable()
    for parameter in trained.values():
        parameter.requires_grad_(True)
    losses = plain_layer_losses(grafted, original, batch)
    terms = [torch.stack([weight * loss[name] for name, weight in config.objective.items()]).sum() for loss in losses]
    expected = torch.autograd.grad(torch.stack(terms).mean(), list(trained.values()), allow_unused=True)
    wanted = {name: gradient for name, gradient in zip(trained, expected, strict=True) if gradient is not None}

    metrics, gradients = run(stage, batch, grafted.model)
    same_gradients(gradients, wanted)
    assert metrics["loss"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    for layer, loss in zip(grafted.students, losses, strict=True):
        assert metrics[f"error/layer_{layer:02d}"] == pytest.approx(loss["relative_mse"].item(), rel=1e-4)
    mean = sum(loss["relative_mse"].item() for loss in losses) / len(losses)
    assert metrics["error"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("keep", ["none", (1,)])
@pytest.mark.parametrize("objective", OBJECTIVES_TRIED)
def test_transfer_equals_a_plain_implementation(
    make_teacher: MakeTeacher, packed_batch: Batch, keep: KeepSoftmax, objective: dict[str, float]
) -> None:
    config = TransferConfig(tokens=1, objective=objective)
    check_transfer(grafted_from(make_teacher, keep), make_teacher(), packed_batch, config)


@pytest.mark.parametrize("objective", OBJECTIVES_TRIED)
@pytest.mark.parametrize("train", [("mixer",), ("mixer", "qkv"), ("qkv", "o"), ("mixer", "qkv", "o")])
def test_transfer_of_base_weights_equals_a_plain_implementation(
    make_teacher: MakeTeacher, packed_batch: Batch, train: tuple[Part, ...], objective: dict[str, float]
) -> None:
    """Targets are the teacher's; heads and answers are the student's own, whose weights have left the teacher's."""
    if "o" in train:
        objective = {"hidden": 0.5} | objective
    config = TransferConfig(tokens=1, objective=objective, train=train)
    grafted = with_moved_weights(grafted_from(make_teacher, attention_bias=True))
    check_transfer(grafted, make_teacher(attention_bias=True), packed_batch, config)


@pytest.mark.parametrize("objective", ["matrix", "hidden", "mse", "relative_mse"])
@pytest.mark.parametrize("frozen_teacher", [False, True])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    make_teacher: MakeTeacher,
    packed_batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    frozen_teacher: bool,
) -> None:
    monkeypatch.setitem(MIXERS, "twin", MixerEntry(TwinConfig, Twin))
    model = make_teacher()
    grafted = graft(model, plan_surgery(model, TwinConfig()))
    if frozen_teacher:
        grafted = with_frozen_teacher(grafted)
    stage = build_stage(TransferConfig(tokens=1, objective={objective: 1.0}), grafted)
    metrics, gradients = run(stage, packed_batch, model)
    assert metrics["loss"] < 1e-5
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    with torch.no_grad():
        for parameter in stage.trainable().values():
            parameter.fill_(0.1)
    metrics, _ = run(stage, packed_batch, model)
    assert metrics["loss"] > 1e-2
    if objective == "matrix":
        assert metrics["loss"] == pytest.approx(0.1 * 24**0.5, rel=1e-4)


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
    assert not any(m._forward_pre_hooks for m in grafted.model.modules() if m is not trunk_of(grafted.model))


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
        {"train": ("lora",), "lora": {"r": 2, "targets": ("q_proj", "o_proj", "down_proj")}},
        {"train": ("mixer",)},
    ],
)
def test_distillation_equals_a_plain_implementation(
    make_teacher: MakeTeacher, packed_batch: Batch, keep: KeepSoftmax, options: dict[str, Any]
) -> None:
    config = DistilConfig(tokens=1, **options)
    names = check_distillation(grafted_from(make_teacher, keep), make_teacher(), packed_batch, config)
    assert any(".mixer." in name for name in names) == ("mixer" in config.train)
    assert any(".lora_A." in name for name in names) == (config.lora is not None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"train": ("all",), "kl": 0.7, "ce": 0.2, "temperature": 2.0},
        {"train": ("mixer", "qkv", "o", "norms")},
        {"train": ("norms", "lora", "qkv"), "lora": {"r": 2, "targets": ("o_proj", "down_proj")}},
    ],
)
def test_distillation_of_base_weights_equals_a_plain_implementation(
    make_teacher: MakeTeacher, packed_batch: Batch, tied: bool, options: dict[str, Any]
) -> None:
    grafted = with_moved_weights(grafted_from(make_teacher, (1,), tie_word_embeddings=tied))
    original = make_teacher(tie_word_embeddings=tied)
    check_distillation(grafted, original, packed_batch, DistilConfig(tokens=1, **options))


def check_distillation(grafted: Graft, original: PreTrainedModel, batch: Batch, config: DistilConfig) -> set[str]:
    """Loss and gradients against the plain implementation; the names of what trains."""
    stage = build_stage(config, grafted)
    stir(grafted.model)
    plain = copy.deepcopy(grafted.model)
    metrics, gradients = run(stage, batch, grafted.model)
    names = set(stage.trainable())
    for name in names:
        plain.get_parameter(name).requires_grad_(True)
    expected = plain_distillation(plain, original, batch, config)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(config.kl * metrics["kl"] + config.ce * metrics["ce"], rel=1e-5)
    same_gradients(gradients, {name: plain.get_parameter(name).grad for name in names})  # type: ignore[misc]
    return names


def test_stages_that_a_model_is_too_small_for() -> None:
    model = tiny_teacher("gpt2")  # 97 tokens, 512 positions
    check_sizes([TransferConfig(tokens=1, length=512), DistilConfig(tokens=1, length=512, top_k=97)], model)
    check_sizes([TransferConfig(tokens=1, length=513)], tiny_teacher("llama"))
    with pytest.raises(RecipeError, match=r"stages.0.length: 513 tokens a row; the model has learned 512 positions"):
        check_sizes([TransferConfig(tokens=1, length=513)], model)
    with pytest.raises(RecipeError, match=r"stages.0.top_k: 98 is more than the vocabulary of 97 has"):
        check_sizes([DistilConfig(tokens=1, length=512, top_k=98)], model)


def test_compiled_mixers_change_neither_results_nor_keys(
    make_teacher: MakeTeacher, packed_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*arguments: Any) -> Any:
            calls.append(function)
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    assert not Conversion(model="any").compile
    found = []
    for compiles in (False, True):
        grafted = grafted_from(make_teacher)
        keys = list(grafted.model.state_dict())
        if compiles:
            grafted.compile_mixers()
        assert list(grafted.model.state_dict()) == keys
        for config in (TransferConfig(tokens=1), DistilConfig(tokens=1)):
            found.append(run(build_stage(config, grafted), packed_batch, grafted.model))
        assert len(calls) == (2 * 3 if compiles else 0)  # no more for evaluation and decoding
        with torch.no_grad():
            grafted.model(packed_batch.input_ids_BT, use_cache=False)
        grafted.model(packed_batch.input_ids_BT[:, :-1], use_cache=True)
        grafted.model.generate(packed_batch.input_ids_BT[:1], max_new_tokens=2, do_sample=False)
        assert len(calls) == (3 * 3 if compiles else 0)  # the first call above with gradients, from no state
    for (metrics, gradients), (other_metrics, other_gradients) in zip(found[:2], found[2:], strict=True):
        assert metrics == other_metrics
        assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


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
