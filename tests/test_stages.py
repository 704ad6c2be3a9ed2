"""Stages against plain implementations: the same losses, the same gradients, and gradients nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from tiny_families import tiny_teacher
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.adapters import LoraSettings, add_lora, lora_layers, lora_off, lora_parameters, merge_lora
from linearize.attention import teacher_rows
from linearize.errors import RecipeError
from linearize.job import Conversion
from linearize.mixers import MIXERS, HeadInputs, HeadShapes, MixerConfig, MixerEntry, MixerState, Rope, StudentMixer
from linearize.mixers.base import RowWeights
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.stages import STAGES, Batch, Stage, StageConfig, build_stage, check_sizes, check_stages
from linearize.stages.distil import DistilConfig
from linearize.stages.parts import Part, trained_parameters
from linearize.stages.transfer import TransferConfig
from linearize.surgery import Graft, KeepSoftmax, graft, plan_surgery, trunk_of, with_frozen_teacher

MakeTeacher = Callable[..., PreTrainedModel]


def grafted_from(make_teacher: MakeTeacher, keep: KeepSoftmax = "none", **overrides: Any) -> Graft:
    """With mixers moved off their start; not so those of the frozen teacher, which nothing reads."""
    model = make_teacher(**overrides)
    grafted = graft(model, plan_surgery(model, HedgehogConfig(), keep))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in grafted.mixer_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.requires_grad_(False)
    return grafted


def with_moved_weights(grafted: Graft) -> Graft:
    """With a frozen teacher, and base weights that have left it: as after a stage that trained them."""
    grafted = with_frozen_teacher(grafted)
    ours = {*grafted.mixer_parameters(), *lora_parameters(grafted.model)}
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in grafted.model.named_parameters():
            if name not in ours:
                parameter.add_(0.02 * torch.randn_like(parameter))
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


class TwinConfig(MixerConfig):
    kind: Literal["twin"] = "twin"


class Twin(StudentMixer):
    """Mixes with the teacher's own attention matrix, plus `off`."""

    rows = "matrix"

    def __init__(self, config: TwinConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.off = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.off)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        return 0

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        rows = teacher_rows(heads, self.shapes)
        return lambda start, stop: rows(start, stop) + self.off

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        weight_BHTT = self.row_weights(heads)(0, heads.q_BTHK.shape[1])
        v_BTHV = heads.v_BTGV.repeat_interleave(heads.q_BTHK.shape[2] // heads.v_BTGV.shape[2], 2)
        return torch.einsum("bhij,bjhv->bihv", weight_BHTT, v_BTHV), ()


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


PROJECTIONS = {"qkv": ("q_proj.", "k_proj.", "v_proj."), "o": ("o_proj.",)}


def expected_names(grafted: Graft, train: tuple[Part, ...]) -> set[str]:
    """By how the tiny Llama calls its parameters; layer 1 stays softmax."""
    found = set()
    for name, _ in grafted.model.named_parameters():
        adapter = ".lora_" in name
        projected = [part for part, keys in PROJECTIONS.items() if "layers.1." not in name and not adapter]
        parts = {part for part in projected if any(key in name for key in PROJECTIONS[part])}
        parts |= {"mixer"} if ".mixer." in name else set()
        parts |= {"norms"} if "norm" in name else set()
        parts |= {"lora"} if adapter else set()
        if "all" in train or not parts.isdisjoint(train):
            found.add(name)
    return found


@pytest.mark.parametrize(
    "config",
    [
        TransferConfig(tokens=1),
        TransferConfig(tokens=1, train=("qkv",)),
        TransferConfig(tokens=1, train=("mixer", "qkv", "o"), objective={"hidden": 1.0, "relative_mse": 1.0}),
        DistilConfig(tokens=1),
        DistilConfig(tokens=1, train=("mixer",)),
        DistilConfig(tokens=1, train=("qkv", "norms")),
        DistilConfig(tokens=1, train=("o", "lora"), lora=LoraSettings(targets=("q_proj", "up_proj"))),
        DistilConfig(tokens=1, train=("all",)),
    ],
    ids=lambda config: f"{config.kind}-{'-'.join(config.train)}",
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "after-lora"])
def test_a_stage_trains_what_it_names_and_nothing_else(
    make_teacher: MakeTeacher, packed_batch: Batch, config: StageConfig, tied: bool, adapted: bool
) -> None:
    """Each parameter before and after one step; that of the frozen teacher never moves."""
    grafted = grafted_from(make_teacher, (1,), tie_word_embeddings=tied, attention_bias=True)
    if config.trains_base:
        grafted = with_frozen_teacher(grafted)
    if adapted:
        add_lora(
            grafted.model, LoraSettings(targets=("q_proj", "up_proj")) if "lora" in config.train else LoraSettings()
        )
        stir(grafted.model)
    if adapted and config == DistilConfig(tokens=1):
        config = DistilConfig(tokens=1, lora=LoraSettings(targets=("q_proj", "up_proj")))
    stage = build_stage(config, grafted)
    stir(grafted.model)
    before = {name: parameter.clone() for name, parameter in grafted.model.named_parameters()}
    with torch.no_grad(), grafted.as_teacher() as teacher, lora_off(grafted.model):
        answers = teacher(packed_batch.input_ids_BT, use_cache=False).logits
    run(stage, packed_batch, grafted.model)
    torch.optim.AdamW(stage.trainable().values(), lr=0.01, weight_decay=0).step()
    moved = {name for name, parameter in grafted.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(stage.trainable()) == expected_names(grafted, config.train)
    with torch.no_grad(), grafted.as_teacher() as teacher, lora_off(grafted.model):
        assert torch.equal(teacher(packed_batch.input_ids_BT, use_cache=False).logits, answers)
    original = make_teacher(tie_word_embeddings=tied, attention_bias=True)
    assert torch.equal(answers, original(packed_batch.input_ids_BT, use_cache=False).logits)


def test_a_mixers_vectors_are_no_norms(make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "twin", MixerEntry(TwinConfig, Twin))
    model = make_teacher()
    names = trained_parameters(graft(model, plan_surgery(model, TwinConfig())), ("norms",))
    assert len(names) == 2 * 3 + 1
    assert all("norm" in name for name in names)


def test_the_frozen_teacher_is_a_graft_of_its_own_weights(make_teacher: MakeTeacher, packed_batch: Batch) -> None:
    """Student layers and the softmax modules they hide share their weights within the copy, with nothing outside."""
    grafted = with_frozen_teacher(grafted_from(make_teacher, (1,), tie_word_embeddings=True))
    teacher = grafted.teacher
    assert teacher is not None
    assert teacher.students.keys() == grafted.students.keys() == {0, 2}
    ours = {id(parameter) for parameter in grafted.model.parameters()}
    assert all(id(parameter) not in ours for parameter in teacher.model.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    for student in teacher.students.values():
        (softmax,) = student._softmax
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert softmax.get_submodule(name) is student.get_submodule(name)
    head, embedding = teacher.model.get_output_embeddings(), teacher.model.get_input_embeddings()
    assert head is not None
    assert head.weight is embedding.weight
    with torch.no_grad(), grafted.as_teacher():
        for parameter in grafted.model.parameters():
            parameter.zero_()
    with torch.no_grad(), grafted.as_teacher() as model:
        found = model(packed_batch.input_ids_BT, use_cache=False).logits
    assert model is teacher.model
    expected = make_teacher(tie_word_embeddings=True)(packed_batch.input_ids_BT, use_cache=False).logits
    assert torch.equal(found, expected)


TRAINED_IN_BF16 = [
    TransferConfig(
        tokens=1, train=("mixer", "qkv", "o"), objective={"hidden": 1.0, "attention_ce": 1.0, "matrix": 1.0}
    ),
    DistilConfig(tokens=1, train=("norms",)),
    DistilConfig(tokens=1, train=("o", "lora"), lora=LoraSettings(targets=("q_proj",))),
    DistilConfig(tokens=1, train=("all",)),
]


@pytest.mark.parametrize("config", TRAINED_IN_BF16, ids=lambda config: f"{config.kind}-{'-'.join(config.train)}")
@pytest.mark.parametrize("tied", [False, True])
def test_base_weights_that_train_are_fp32_meanwhile(
    make_teacher: MakeTeacher, packed_batch: Batch, config: StageConfig, tied: bool
) -> None:
    model = make_teacher(tie_word_embeddings=tied).bfloat16()
    grafted = with_frozen_teacher(graft(model, plan_surgery(model, HedgehogConfig(), (1,))))
    same = {name: id(parameter) for name, parameter in model.named_parameters()}
    stage = build_stage(config, grafted)
    trained = stage.trainable()
    for name, parameter in model.named_parameters():
        ours = ".mixer." in name or ".lora_" in name or name in trained
        assert parameter.dtype == (torch.float32 if ours else torch.bfloat16), name
        assert id(parameter) == same.get(name.replace(".base_layer", ""), id(parameter))
    for student in grafted.students.values():
        (softmax,) = student._softmax
        assert softmax.get_parameter("o_proj.weight") is student.get_parameter("o_proj.weight")
    with torch.autocast("cpu", torch.bfloat16):
        metrics, gradients = run(stage, packed_batch, model)
        with torch.no_grad():
            student_logits = model(packed_batch.input_ids_BT, use_cache=False).logits
    assert all(value == value for value in metrics.values())
    assert gradients.keys() == trained.keys()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert torch.isfinite(student_logits).all()
    assert grafted.teacher is not None
    assert {p.dtype for n, p in grafted.teacher.model.named_parameters() if ".mixer." not in n} == {torch.bfloat16}
    grafted.restore_dtypes()
    for name, parameter in model.named_parameters():
        ours = ".mixer." in name or ".lora_" in name
        assert parameter.dtype == (torch.float32 if ours else torch.bfloat16), name
        assert id(parameter) == same.get(name.replace(".base_layer", ""), id(parameter))


@pytest.mark.parametrize("part", ["qkv", "o"])
def test_weights_and_an_adapter_of_one_projection_do_not_train_together(make_teacher: MakeTeacher, part: Part) -> None:
    plan = plan_surgery(make_teacher(), HedgehogConfig())
    good = DistilConfig(tokens=1, train=(part, "lora"), lora=LoraSettings(targets=("up_proj",)))
    check_stages([good], plan)
    wrong = DistilConfig(tokens=1, train=(part, "lora"))
    said = rf"stages.1.train: {part} trains the weights of .*, which lora adapts in the same stage; .* Take {part} out"
    with pytest.raises(RecipeError, match=said):
        check_stages([good, wrong], plan)


def test_stages_that_a_model_is_too_small_for() -> None:
    model = tiny_teacher("gpt2")  # 97 tokens, 512 positions
    check_sizes([TransferConfig(tokens=1, length=512), DistilConfig(tokens=1, length=512, top_k=97)], model)
    check_sizes([TransferConfig(tokens=1, length=513)], tiny_teacher("llama"))
    with pytest.raises(RecipeError, match=r"stages.0.length: 513 tokens a row; the model has learned 512 positions"):
        check_sizes([TransferConfig(tokens=1, length=513)], model)
    with pytest.raises(RecipeError, match=r"stages.0.top_k: 98 is more than the vocabulary of 97 has"):
        check_sizes([DistilConfig(tokens=1, length=512, top_k=98)], model)


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
