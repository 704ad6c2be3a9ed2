"""The parts that a stage trains: those it names and no others, in fp32, beside a frozen teacher."""

from __future__ import annotations

import pytest
import torch

from linearize.adapters import LoraSettings, add_lora, lora_off
from linearize.errors import RecipeError
from linearize.mixers import MIXERS, MixerEntry
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.stages import Batch, StageConfig, build_stage, check_stages
from linearize.stages.distil import DistilConfig
from linearize.stages.parts import Part, trained_parameters
from linearize.stages.transfer import TransferConfig
from linearize.surgery import Graft, graft, plan_surgery, with_frozen_teacher
from tests.grafts import MakeTeacher, Twin, TwinConfig, grafted_from, run, stir

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
