"""One contract for all families: the grafted model is its teacher, and a student sees exactly what its teacher sees.

Shape legend in mixers/base.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import (
    LAYERS,
    SPECIAL,
    Exact,
    ExactConfig,
    difference_of_ways,
    read_in_all_ways,
    tiny_teacher,
    ways_to_read,
)
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from linearize.adapters import LoraSettings, add_lora, lora_parameters
from linearize.attention import StudentAttention
from linearize.cli import main
from linearize.doctor import Patient, check_chunked, check_memory, check_packed, check_padding, check_reorder
from linearize.errors import SurgeryError, TeacherError, UnknownFamilyError
from linearize.export import export_student, load_student
from linearize.families import FAMILIES, NOT_TEXT, Fused, QueryKeyNorm, Split
from linearize.families.inspection import propose
from linearize.logits import head_of
from linearize.mixers import MIXERS, MixerEntry, mixer_config
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.modeling import STUDENT_CLASSES
from linearize.readings import read_layers
from linearize.recipe import Recipe, load_recipe
from linearize.stages import Batch, build_stage
from linearize.surgery import Graft, graft, plan_surgery, sliding_layers, trunk_of
from linearize.teacher_files import find_checkpoint, read_config

MakeTokens = Callable[..., Tensor]
CUT = 50
KINDS = tuple(MIXERS)


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIXERS, "exact", MixerEntry(ExactConfig, Exact))
        yield


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, use_cache=False, **arguments).logits


def test_every_family_is_tested() -> None:
    assert SPECIAL.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_teacher_changes_no_bit(family: str, dtype: torch.dtype, make_tokens: MakeTokens) -> None:
    model, ids = tiny_teacher(family), make_tokens(2, 70)
    for parameter in model.parameters():  # as from_pretrained does: model.to(dtype) would round RoPE's frequencies too
        parameter.data = parameter.data.to(dtype)
    original = copy.deepcopy(model)
    grafted = graft(model, plan_surgery(model, HedgehogConfig(), replace_sliding=True))
    with grafted.as_teacher() as teacher:
        for arguments in ways_to_read(ids).values():
            assert torch.equal(logits(teacher, ids, **arguments), logits(original, ids, **arguments))
    assert logits(model, ids).dtype == dtype
    assert not torch.equal(logits(model, ids), logits(original, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_with_softmax_as_its_mixer_is_its_teacher(family: str, make_tokens: MakeTokens) -> None:
    model, ids = tiny_teacher(family), make_tokens(2, 90)
    said = {"attention_mask": ways_to_read(ids)["padded"]["attention_mask"], "max_new_tokens": 5, "do_sample": False}
    expected, generated = read_in_all_ways(model, ids), model.generate(ids, **said)
    whole = logits(model, ids)
    grafted = graft(model, plan_surgery(model, ExactConfig(), replace_sliding=True))
    assert len(grafted.students) == LAYERS
    for way, found in read_in_all_ways(model, ids).items():
        torch.testing.assert_close(found, expected[way], rtol=1e-5, atol=1e-5, msg=lambda m, w=way: f"{w}: {m}")
    assert torch.equal(model.generate(ids, **said), generated)
    with torch.no_grad():
        start = model(ids[:, :CUT], use_cache=True)
        rest = model(ids[:, CUT:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole, rtol=1e-5, atol=1e-5)
    assert max(layer.recomputed for layer in read_layers(grafted, ids)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_a_student_is_told_matters_in_these_teachers(family: str) -> None:
    """The comparison above means something only where a wrong number changes the logits."""
    plan = plan_surgery(tiny_teacher(family), ExactConfig(), replace_sliding=True)
    told = [swap.shapes for swap in plan]
    faults: list[list[dict[str, Any]]] = [[{"scaling": 1.5 * shapes.scaling} for shapes in told]]
    for name, nothing in (("rotates", False), ("soft_cap", None), ("window", None)):
        if any(getattr(shapes, name) != nothing for shapes in told):
            faults.append([{name: nothing}] * len(told))
    for fault in faults:
        model = tiny_teacher(family)
        wrong = tuple(replace(s, shapes=replace(s.shapes, **f)) for s, f in zip(plan, fault, strict=True))
        assert difference_of_ways(model, partial(graft, model, wrong)) > 1e-2, fault[0]


def test_a_teacher_never_drops_out() -> None:
    model = tiny_teacher("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    grafted = graft(model, plan_surgery(model, HedgehogConfig()))
    model.train()
    student, x_BTD = grafted.students[0], torch.randn(1, 8, 64)
    with grafted.as_teacher():
        seen = [student(x_BTD)[0] for _ in range(2)]
    assert torch.equal(*seen)


WITHOUT: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3": ({"norm": None}, "nothing is known of its k_norm, q_norm"),
    "gemma3_text": ({"norm": None}, "nothing is known of its k_norm, q_norm"),
    "stablelm": ({"norm": None}, "nothing is known of its k_layernorm, q_layernorm"),
    "gpt2": ({"idle": ()}, "nothing is known of its attn_dropout, resid_dropout"),
    "llama": ({"norm": QueryKeyNorm()}, "no norm q_norm; layer 0: no norm k_norm"),
    "phi3": ({"projections": Split()}, r"no projection q_proj, k_proj, v_proj \(found: o_proj, qkv_proj\)"),
    "gpt_neox": ({"output": "c_proj"}, r"no projection c_proj \(found: dense, query_key_value\)"),
}


@pytest.mark.parametrize("family", WITHOUT)
def test_a_description_that_says_too_little_or_too_much_is_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, said = WITHOUT[family]
    model = tiny_teacher(family)
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **changes))
    with pytest.raises(SurgeryError, match=said):
        plan_surgery(model, HedgehogConfig(), replace_sliding=True)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"soft_cap": None}),
    ("gemma2", {"window": None}),
    ("qwen2", {"window": None}),
    ("smollm3", {"rope_layers": None}),
    ("gpt_neox", {"projections": Fused("query_key_value", "blocks")}),
    ("gpt2", {"projections": Fused("c_attn", "heads")}),
    ("stablelm", {"hands_on": True}),
]


@pytest.mark.parametrize(
    ("family", "changes"), WRONG, ids=lambda value: value if isinstance(value, str) else next(iter(value))
)
def test_every_piece_of_a_description_is_read(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description that is wrong in one piece gives other logits, so the equality above means something."""
    model = tiny_teacher(family)
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **changes))
    difference = difference_of_ways(
        model, lambda: graft(model, plan_surgery(model, ExactConfig(), replace_sliding=True))
    )
    assert difference > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "smollm3", "gemma2"])
def test_mixers_of_every_kind_run_on_its_heads(family: str, make_tokens: MakeTokens) -> None:
    """Without RoPE, with partial RoPE, in some layers, with wide heads: a forward and a step of each mixer."""
    ids = make_tokens(1, 40)
    for kind in KINDS:
        model = tiny_teacher(family)
        graft(model, plan_surgery(model, mixer_config({"kind": kind}), replace_sliding=True))
        whole = logits(model, ids)
        with torch.no_grad():
            start = model(ids[:, :-1], use_cache=True)
            last = model(ids[:, -1:], past_key_values=start.past_key_values, use_cache=True).logits
        assert torch.isfinite(whole).all(), kind
        torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-3, atol=1e-3, msg=lambda m, k=kind: f"{k}: {m}")


def test_sliding_layers_stay_softmax_unless_asked() -> None:
    model = tiny_teacher("gemma3_text")
    assert sliding_layers(model) == {1: 16}
    assert [swap.layer for swap in plan_surgery(model, HedgehogConfig())] == [0, 2]
    assert [swap.shapes.window for swap in plan_surgery(model, HedgehogConfig(), replace_sliding=True)] == [
        None,
        16,
        None,
    ]


def trained(family: str, batch: Batch, dtype: torch.dtype) -> tuple[Graft, Recipe]:
    """A student after two steps of each stage; layers that slide stay as they are."""
    recipe = load_recipe("hedgehog", ["stages.1.lora.r=2", "mixer.features=8"])
    model = tiny_teacher(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    grafted = graft(model, plan_surgery(model, recipe.mixer))
    for config in recipe.stages:
        stage = build_stage(config, grafted)
        parameters = list(stage.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for _ in range(2):
            assert torch.isfinite(stage.train_micro_batch(batch, lambda loss: loss.backward())["loss"])
            assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)
            optimizer.step()
            optimizer.zero_grad()
        model.requires_grad_(False)
    return grafted, recipe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_written_loaded_and_generating(
    family: str, dtype: torch.dtype, packed_batch: Batch, tokenizer: Any, tmp_path: Path, make_tokens: MakeTokens
) -> None:
    grafted, recipe = trained(family, packed_batch, dtype)
    export_student(grafted, tokenizer, recipe, tmp_path)
    loaded, ids = load_student(tmp_path), make_tokens(2, 40)
    assert type(loaded) is STUDENT_CLASSES[family][1]
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, ids), logits(grafted.model, ids))
    said = {"attention_mask": ways_to_read(ids)["padded"]["attention_mask"], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **said), grafted.model.generate(ids, **said))


QUICK = (check_chunked, check_padding, check_packed, check_reorder, check_memory)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_student_beside_softmax_layers_is_the_same_in_every_way_of_computing_it(family: str) -> None:
    """The doctor's checks that concern caches and masks; all of them, on disk, in scripts/families_table.py."""
    model = tiny_teacher(family)
    graft(model, plan_surgery(model, HedgehogConfig(), (1,)))
    patient = Patient.of(model)
    assert [finding for check in QUICK if not (finding := check(patient)).passed] == []


@pytest.mark.parametrize(("window", "slides"), [(511, True), (512, False)])
def test_a_window_that_holds_the_longest_sequence_is_none(window: int, slides: bool) -> None:
    assert bool(sliding_layers(tiny_teacher("phi3", sliding_window=window))) is slides


def test_attention_that_looks_ahead_or_across_is_refused() -> None:
    ahead = tiny_teacher("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(SurgeryError, match="attends in both directions"):
        plan_surgery(ahead, HedgehogConfig())
    with pytest.raises(SurgeryError, match="'gpt2' attends to the states of an encoder"):
        plan_surgery(tiny_teacher("gpt2", add_cross_attention=True), HedgehogConfig())
    sizes = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(SurgeryError, match="'t5' attends to the states of an encoder.*decoder-only"):
        plan_surgery(T5ForConditionalGeneration(T5Config(**sizes)), HedgehogConfig())


def test_of_a_multimodal_model_only_the_text_model_is_taken(tmp_path: Path, make_tokens: MakeTokens) -> None:
    text = tiny_teacher("gemma3_text").config.to_dict() | {"rope_parameters": None, "layer_types": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    whole = Gemma3ForConditionalGeneration(config).eval()
    assert set(NOT_TEXT.values()) <= set(FAMILIES)
    with pytest.raises(SurgeryError, match="'gemma3' reads images too; only its text model \\('gemma3_text'\\)"):
        plan_surgery(whole, HedgehogConfig())
    config.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"reads more than text \(gemma3\); only its text model \(gemma3_text\)"):
        read_config(find_checkpoint(str(tmp_path)))

    taken = Gemma3ForCausalLM(whole.config.text_config).eval()  # as docs/families.md shows
    taken.model.load_state_dict(whole.model.language_model.state_dict())
    taken.tie_weights()
    assert torch.equal(logits(taken, make_tokens(1, 20)), logits(whole, make_tokens(1, 20)))
    assert len(plan_surgery(taken, HedgehogConfig(), replace_sliding=True)) == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_sees_the_logits_of_the_model(family: str, make_tokens: MakeTokens) -> None:
    model, ids = tiny_teacher(family), make_tokens(1, 20)
    with torch.no_grad():
        hidden = trunk_of(model)(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head_of(model)(hidden), logits(model, ids), rtol=1e-5, atol=1e-5)


def test_the_command_lists_families(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.commands.options.out_console.width", 200)
    monkeypatch.setattr("sys.argv", ["linearize", "families"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(family in shown for family in FAMILIES)


SMALL = [f"stages.{stage}.{key}" for stage in (0, 1) for key in ("length=16", "batch=2", "micro_batch=2")]


def plan(model: PreTrainedModel, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """`linearize plan` on a folder; its exit code."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr("linearize.commands.options.out_console.width", 200)
    options = [word for value in SMALL for word in ("--set", value)]
    monkeypatch.setattr("sys.argv", ["linearize", "plan", "-m", str(folder), "--device", "cpu", *options])
    try:
        return main()
    except SystemExit as ended:
        return ended.code


def test_a_plan_says_what_stays_and_what_is_not_copied(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tiny_teacher("gemma2"), tokenizer, tmp_path, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 layers become hedgehog" in shown
    assert "1: they slide over 16 tokens already; replace_sliding: true replaces them too" in shown
    assert "the teacher caps them at 2 by tanh; no mixer does" in shown


def test_a_plan_of_an_unknown_family_prints_a_description(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert plan(OPTForCausalLM(OPTConfig(**sizes)), tokenizer, tmp_path, monkeypatch) == 2
    shown = capsys.readouterr()
    assert "# not understood: positions" in shown.out
    assert 'ModelFamily(\n    model_type="opt",' in shown.out
    assert "unknown model family 'opt'" in " ".join(shown.err.split())


SEEN: dict[str, set[str]] = {
    # what only the source says: field of the description that inspection cannot see
    "gpt_neox": {"projections"},
    "stablelm": {"norm", "hands_on"},
    "smollm3": {"rope_layers"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_inspection_finds_what_we_wrote_down(family: str) -> None:
    found = propose(tiny_teacher(family)).family
    assert found is not None
    blind = SEEN.get(family, set()) | {"examples", "special", "mlp", "window"}
    written = FAMILIES[family]
    for field in fields(written):
        if field.name not in blind:
            assert getattr(found, field.name) == getattr(written, field.name), field.name


def test_an_unknown_family_is_proposed_and_never_applied() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes))
    with pytest.raises(UnknownFamilyError, match="Not understood in this one: positions: attention takes no") as caught:
        plan_surgery(model, HedgehogConfig())
    assert 'layers="model.decoder.layers"' in caught.value.proposal
    assert 'output="out_proj"' in caught.value.proposal
    assert not any(isinstance(module, StudentAttention) for module in model.modules())
    with pytest.raises(UnknownFamilyError, match="which module of a layer is its attention"):
        plan_surgery(MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)), HedgehogConfig())


def test_lora_targets_are_words_that_every_family_understands() -> None:
    for family in FAMILIES:
        model = tiny_teacher(family)
        add_lora(model, LoraSettings(r=2, targets=("attention", "mlp")))
        described = FAMILIES[family]
        adapted = {name.rpartition(".lora")[0].removeprefix(f"{described.layers}.") for name in lora_parameters(model)}
        wanted = {f"{described.attention}.{name}" for name in described.submodules} | set(described.mlp)
        assert adapted == {f"{layer}.{name}" for layer in range(LAYERS) for name in wanted}, family
