"""Plan, then operate: plans are pure, misfits are listed, the grafted model is still its teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_families import Exact, ExactConfig
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from linearize.adapters import LoraSettings, add_lora, lora_layers, lora_off, lora_parameters
from linearize.errors import SurgeryError
from linearize.families import FAMILIES
from linearize.mixers import MIXERS, HeadShapes, MixerEntry
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.surgery import EveryNth, KeepSoftmax, graft, plan_surgery

MakeTeacher = Callable[..., PreTrainedModel]
MIXER = HedgehogConfig()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> ExactConfig:
    monkeypatch.setitem(MIXERS, "exact", MixerEntry(ExactConfig, Exact))
    return ExactConfig()


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    yield
    assert modules == {name: id(module) for name, module in model.named_modules()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, use_cache=False, **arguments).logits


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        ("none", [0, 1, 2, 3]),
        ((), [0, 1, 2, 3]),
        ((1, 3), [0, 2]),
        (EveryNth(every=2), [1, 3]),
        (EveryNth(every=3), [1, 2]),
        (EveryNth(every=9), [1, 2, 3]),
        ((0, 1, 2, 3), []),
    ],
)
def test_a_plan_says_which_layers_and_changes_nothing(
    make_teacher: MakeTeacher, keep: KeepSoftmax, layers: list[int]
) -> None:
    model = make_teacher(num_hidden_layers=4)
    with unchanged(model):
        before = torch.get_rng_state()
        plan = plan_surgery(model, MIXER, keep)
        assert torch.equal(before, torch.get_rng_state())
    assert [swap.layer for swap in plan] == layers
    assert [swap.path for swap in plan] == [f"model.layers.{layer}.self_attn" for layer in layers]
    assert plan == plan_surgery(model, MIXER, keep)
    assert sorted(graft(model, plan).students) == layers


@pytest.mark.parametrize("features", [None, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_counts_what_a_graft_adds(make_teacher: MakeTeacher, features: int | None, tied: bool) -> None:
    model = make_teacher(head_dim=24)
    before = {id(parameter) for parameter in model.parameters()}
    plan = plan_surgery(model, HedgehogConfig(features=features, tied=tied))
    grafted = graft(model, plan)
    width = features or 24
    for swap in plan:
        assert swap.parameters == (1 if tied else 2) * 4 * 24 * width
        assert swap.state_bytes == 4 * 4 * 2 * width * (24 + 1)
        assert swap.shapes == HeadShapes(64, 4, 2, 24, 24, 24**-0.5)
    added = [parameter for parameter in model.parameters() if id(parameter) not in before]
    assert sum(parameter.numel() for parameter in added) == sum(swap.parameters for swap in plan)
    assert {id(p) for p in grafted.mixer_parameters().values()} == {id(p) for p in added}
    assert all(".self_attn.mixer." in name for name in grafted.mixer_parameters())
    assert before <= {id(parameter) for parameter in model.parameters()}  # the base weights are the teacher's own


@pytest.mark.parametrize(("keep", "message"), [((3, 7), r"layers \[3, 7\] do not exist.*0 to 2"), ((-1,), r"\[-1\]")])
def test_layers_that_do_not_exist(make_teacher: MakeTeacher, keep: KeepSoftmax, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        plan_surgery(make_teacher(), MIXER, keep)


@pytest.mark.parametrize("every", [1, 0, -2])
def test_every_must_leave_something(make_teacher: MakeTeacher, every: int) -> None:
    with pytest.raises(SurgeryError, match="keep_softmax.*would keep every layer softmax"):
        plan_surgery(make_teacher(), MIXER, EveryNth(every=every))


def test_every_misfit_of_every_layer_is_listed(make_teacher: MakeTeacher) -> None:
    model = make_teacher(num_hidden_layers=5)
    attention = [layer.self_attn for layer in model.model.layers]
    del attention[0].k_proj, attention[0].o_proj
    attention[1].q_proj = nn.Linear(64, 62)
    attention[1].v_proj = nn.Linear(64, 33)
    attention[2].sink = nn.Parameter(torch.zeros(4))
    attention[4].q_proj = nn.Linear(64, 63)
    with unchanged(model), pytest.raises(SurgeryError) as caught:
        plan_surgery(model, MIXER, keep_softmax=(4,))
    text = str(caught.value)
    assert "4 misfit(s)" in text
    assert "layer 0: no projection k_proj, o_proj (found: q_proj, v_proj" in text
    assert "layer 1: q_proj has 62 rows, which 4 heads do not divide" in text
    assert "layer 1: v_proj has 33 rows, which 2 heads do not divide" in text
    assert "layer 2: parameter sink outside the projections" in text
    assert "layer 3" not in text
    assert "layer 4" not in text
    assert "Nothing was changed" in text


def test_query_heads_that_do_not_divide(make_teacher: MakeTeacher) -> None:
    model = make_teacher(num_hidden_layers=1)
    model.config.num_attention_heads = 5
    with pytest.raises(SurgeryError, match="5 query heads do not divide into 2 key/value heads; .*q_proj has 64 rows"):
        plan_surgery(model, MIXER)


def test_layers_that_slide_are_replaced_only_when_asked(make_teacher: MakeTeacher) -> None:
    sliding = make_teacher("mistral", sliding_window=32)
    with pytest.raises(SurgeryError, match="slides over a window of 32 tokens already.*`replace_sliding: true`"):
        plan_surgery(sliding, MIXER)
    assert plan_surgery(sliding, MIXER, (0, 1, 2)) == ()  # all kept by the recipe itself
    asked = plan_surgery(sliding, MIXER, replace_sliding=True)
    assert [swap.shapes.window for swap in asked] == [32, 32, 32]
    assert [swap.shapes.window for swap in plan_surgery(make_teacher("mistral"), MIXER)] == [None, None, None]


def test_a_second_graft_is_refused(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    graft(model, plan_surgery(model, MIXER, (0,)))
    for keep in ("none", (1, 2)):  # config.json describes one mixer, in the layers that were replaced at one time
        with pytest.raises(SurgeryError, match="is a student already. Convert its teacher"):
            plan_surgery(model, MIXER, keep)


def test_an_unknown_family_lists_the_known() -> None:
    model = OPTForCausalLM(OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(SurgeryError) as caught:
        plan_surgery(model, MIXER)
    assert "unknown model family 'opt'" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_an_empty_plan_changes_no_bit(make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor]) -> None:
    model, ids = make_teacher(), make_tokens(2, 30)
    before = logits(model, ids)
    with unchanged(model):
        graft(model, plan_surgery(model, MIXER, (0, 1, 2)))
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("keep", ["none", (1,)])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_as_teacher_changes_no_bit(
    make_teacher: MakeTeacher,
    make_tokens: Callable[..., Tensor],
    family: str,
    keep: KeepSoftmax,
    lora: bool,
    attention: str,
) -> None:
    model, ids = make_teacher(family, attn_implementation=attention, attention_dropout=0.3), make_tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    original, said = copy.deepcopy(model), {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    model.train()  # grafting in training mode must not leave the teacher's dropout on for good
    grafted = graft(model, plan_surgery(model, MIXER, keep))
    if lora:
        add_lora(model, LoraSettings())
        for parameter in lora_parameters(model).values():
            nn.init.normal_(parameter, std=0.5)
    model.eval()
    assert not torch.equal(logits(model, ids), logits(original, ids))
    for _ in range(2):
        with grafted.as_teacher() as teacher, lora_off(model):
            assert torch.equal(logits(teacher, ids), logits(original, ids))
            assert torch.equal(logits(teacher, ids, attention_mask=mask), logits(original, ids, attention_mask=mask))
            assert torch.equal(teacher.generate(ids, **said), original.generate(ids, **said))
    assert {student.mode for student in grafted.students.values()} == {"student"}
    assert not torch.equal(logits(model, ids), logits(original, ids))


def test_as_teacher_ends_with_an_error_too(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    grafted = graft(model, plan_surgery(model, MIXER))
    with pytest.raises(KeyError), grafted.as_teacher():
        raise KeyError
    assert {student.mode for student in grafted.students.values()} == {"student"}


def test_lora_off_puts_back_what_was(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    add_lora(model, LoraSettings())
    names = sorted(lora_parameters(model))
    for number, name in enumerate(names):
        model.get_parameter(name).requires_grad_(number % 2 == 0)
    with lora_off(model):
        with lora_off(model):
            pass
        assert all(layer.disable_adapters for layer in lora_layers(model))  # still off after the inner one
    assert not any(layer.disable_adapters for layer in lora_layers(model))
    assert [model.get_parameter(name).requires_grad for name in names] == [n % 2 == 0 for n in range(len(names))]


TEACHERS: dict[str, dict[str, Any]] = {
    "gqa2": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("teacher", [*TEACHERS, "mistral"])
def test_a_student_with_softmax_as_its_mixer_is_its_teacher(
    make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor], exact: ExactConfig, teacher: str
) -> None:
    model = make_teacher("mistral") if teacher == "mistral" else make_teacher(**TEACHERS[teacher])
    ids, mask = make_tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :20] = 0
    packed = torch.cat([torch.arange(40), torch.arange(50)]).expand(2, -1)
    asked: list[dict[str, Any]] = [{}, {"attention_mask": mask}, {"position_ids": packed}]
    expected = [logits(model, ids, **arguments) for arguments in asked]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    graft(model, plan_surgery(model, exact))
    for arguments, wanted in zip(asked, expected, strict=True):
        real = arguments.get("attention_mask", torch.ones_like(mask)).bool()
        torch.testing.assert_close(logits(model, ids, **arguments)[real], wanted[real], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), generated)


def test_restarting_positions_with_a_cache_are_one_document(
    make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor], exact: ExactConfig
) -> None:
    """transformers looks for packed rows only without a cache; student layers must not differ from softmax layers."""
    model, ids = make_teacher(), make_tokens(2, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=True).logits
        graft(model, plan_surgery(model, exact))
        found = model(ids, position_ids=positions, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(model, ids, position_ids=positions), atol=1e-2)


def test_a_mask_given_by_position_is_seen_too(
    make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor], exact: ExactConfig
) -> None:
    model, ids, mask = make_teacher(), make_tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = model.model(ids, mask).last_hidden_state
        graft(model, plan_surgery(model, exact))
        found = model.model(ids, mask).last_hidden_state
    torch.testing.assert_close(found[:, 7:], expected[:, 7:], rtol=1e-5, atol=1e-5)


def test_every_key_head_and_bias_matters_in_these_teachers(
    make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor]
) -> None:
    """The comparisons above mean something only where scaling and biases change the logits."""
    ids = make_tokens(1, 90)
    plain = logits(make_teacher(), ids)
    for name in ("linear_rope", "llama3_rope", "bias"):
        assert not torch.allclose(logits(make_teacher(**TEACHERS[name]), ids), plain, atol=1e-2)


def test_mixers_are_fp32_in_a_bf16_teacher(make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor]) -> None:
    model = make_teacher().bfloat16()
    grafted = graft(model, plan_surgery(model, MIXER))
    assert {parameter.dtype for parameter in grafted.mixer_parameters().values()} == {torch.float32}
    found = logits(model, make_tokens(1, 40))
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), logits(model.float(), make_tokens(1, 40)), dim=-1).min() > 0.99
