"""Student classes: what is saved is what is loaded, and nothing is made up on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from linearize.attention import StudentAttention
from linearize.errors import LinearizeError, RunError, SurgeryError
from linearize.export import load_student
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.modeling import STUDENT_CLASSES, student_config
from linearize.recipe import load_recipe, recipe_names
from linearize.surgery import Graft, KeepSoftmax, graft, plan_surgery
from tests.grafts import as_exported

MIXER = HedgehogConfig(normalisation="exp", features=6, bias=True)
MakeTeacher = Callable[..., PreTrainedModel]


def student_of(make_teacher: MakeTeacher, keep: KeepSoftmax = "none", family: str = "llama", **sizes: Any) -> Any:
    """A student class instance with the weights of a graft whose mixers were moved off their start; and that graft."""
    model = make_teacher(family, **sizes)
    grafted = graft(model, plan_surgery(model, MIXER, keep))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in grafted.mixer_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    config = student_config(model.config, MIXER, tuple(sorted(grafted.students)))
    student = STUDENT_CLASSES[family][1](config).eval()
    student.load_state_dict(model.state_dict())
    return student, grafted


@pytest.fixture
def folder(make_teacher: MakeTeacher, tmp_path: Path) -> Path:
    student, _ = student_of(make_teacher, (1,))
    student.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def change_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("keep", ["none", (1,)])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_is_the_same_to_the_bit(
    make_teacher: MakeTeacher,
    make_tokens: Callable[..., Tensor],
    tmp_path: Path,
    family: str,
    keep: KeepSoftmax,
    tied: bool,
) -> None:
    student, grafted = student_of(make_teacher, keep, family, tie_word_embeddings=tied)
    ids = make_tokens(2, 70)
    assert torch.equal(logits(student, ids), logits(grafted.model, ids))
    student.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path)
    for loaded in (auto.eval(), load_student(tmp_path)):
        assert type(loaded) is STUDENT_CLASSES[family][1]
        assert torch.equal(logits(loaded, ids), logits(student, ids))
        assert loaded.state_dict().keys() == student.state_dict().keys()
    auto.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_student(tmp_path / "again"), ids), logits(student, ids))


def test_names_of_weights_are_the_teachers_and_the_mixers(make_teacher: MakeTeacher, folder: Path) -> None:
    saved, teacher = set(load_file(folder / "model.safetensors")), set(make_teacher().state_dict())
    assert teacher <= saved
    extra = {name.split(".self_attn.")[0] + ".self_attn.mixer." for name in saved - teacher}
    assert extra == {"model.layers.0.self_attn.mixer.", "model.layers.2.self_attn.mixer."}
    assert all(".self_attn.mixer." in name for name in saved - teacher)


def test_config_survives_auto_config(make_teacher: MakeTeacher, folder: Path) -> None:
    config, teacher = AutoConfig.from_pretrained(folder), make_teacher().config
    assert type(config) is STUDENT_CLASSES["llama"][0]
    assert config.linearize == {"format": 1, "mixer": MIXER.model_dump(mode="json"), "layers": [0, 2]}
    assert config.layer_types == ["hybrid", "full_attention", "hybrid"]
    assert config.architectures == ["LinearizedLlamaForCausalLM"]
    kept = teacher.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "layer_types", "dtype", "_name_or_path"):
        kept.pop(key, None)
    found = config.to_dict()
    assert {key: found[key] for key in kept} == kept
    config.save_pretrained(folder / "again")
    again = AutoConfig.from_pretrained(folder / "again").to_dict()
    assert {**again, "_name_or_path": ""} == {**found, "_name_or_path": ""}


@pytest.mark.parametrize("way", ["whole", "partial"])
def test_missing_mixer_weights_are_refused_and_never_random(folder: Path, way: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if ".layers.0." in name and ".mixer." in name and (way == "whole" or "key_map" in name):
                del tensors[name]

    before = load_file(folder / "model.safetensors")
    change_weights(folder, drop)
    with pytest.raises(RunError, match=r"do not fit its config: .*missing_keys.*layers\.0\.self_attn\.mixer\.key_map"):
        load_student(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # transformers itself only warns
    mixer = loaded.model.layers[0].self_attn.mixer
    assert torch.equal(mixer.key_map.weight_HKF, torch.eye(16, 6).expand(4, -1, -1))
    assert not mixer.key_map.bias_HF.any()
    name = "model.layers.0.self_attn.mixer.query_map.weight_HKF"
    expected = before[name] if way == "partial" else torch.eye(16, 6).expand(4, -1, -1)
    assert torch.equal(mixer.query_map.weight_HKF, expected)
    name = "model.layers.2.self_attn.mixer.query_map.weight_HKF"
    assert torch.equal(loaded.model.layers[2].self_attn.mixer.query_map.weight_HKF, before[name])


def test_initial_values_survive_construction(make_teacher: MakeTeacher) -> None:
    """transformers initialises weights after construction; the mixers' own start must be what remains."""
    config = student_config(make_teacher().config, MIXER, (0, 1, 2))
    with torch.device("cpu"):
        direct, auto = STUDENT_CLASSES["llama"][1](config), AutoModelForCausalLM.from_config(config)
    direct.init_weights()
    for model in (direct, auto):
        for layer in model.model.layers:
            for maps in (layer.self_attn.mixer.query_map, layer.self_attn.mixer.key_map):
                assert torch.equal(maps.weight_HKF, torch.eye(16, 6).expand(4, -1, -1))
                assert not maps.bias_HF.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_low_precision_keeps_mixers_fp32(
    folder: Path, make_tokens: Callable[..., Tensor], dtype: torch.dtype | str
) -> None:
    exact = load_student(folder)
    if dtype == "auto":  # as a bf16 run writes it: base bf16, mixers fp32
        change_weights(
            folder,
            lambda tensors: tensors.update(
                {name: tensor.bfloat16() for name, tensor in tensors.items() if ".mixer." not in name}
            ),
        )
        change_json(folder, lambda values: values.update(dtype="bfloat16"))
    loaded = load_student(folder, dtype=dtype)
    low = torch.bfloat16 if dtype == "auto" else dtype
    assert loaded.dtype == low
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if ".mixer." in name else low), name
        if ".mixer." in name:
            assert torch.equal(parameter, exact.get_parameter(name))
    found = logits(loaded, make_tokens(1, 40)).float()
    assert torch.nn.functional.cosine_similarity(found, logits(exact, make_tokens(1, 40)), dim=-1).min() > 0.98


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda c: c.pop("linearize"), SurgeryError, "no `linearize` entry.*LlamaForCausalLM.*linearize convert"),
        (lambda c: c["linearize"].update(format=2), SurgeryError, "format 2.*newer"),
        (lambda c: c["linearize"]["mixer"].update(kind="zzz"), LinearizeError, "unknown mixer 'zzz'"),
        (lambda c: c["linearize"]["mixer"].update(zzz=1), LinearizeError, "mixer hedgehog: zzz: Extra inputs"),
        (lambda c: c["linearize"].update(layers=[0, 2, 9]), SurgeryError, r"layers \[9\] do not exist"),
        (lambda c: c["linearize"].update(layers=[0]), RunError, "unexpected_keys.*layers.2.self_attn.mixer"),
        (lambda c: c["linearize"].update(layers=[0, 1, 2]), RunError, "missing_keys.*layers.1.self_attn.mixer"),
        (lambda c: c["linearize"]["mixer"].update(features=7), RunError, "do not fit its config"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], error: type[Exception], said: str
) -> None:
    change_json(folder, change)
    with pytest.raises(error, match=said):
        load_student(folder)


def test_a_broken_weight_file_is_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=str(folder)):
        load_student(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match=str(folder)):
        load_student(folder)
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match=r"holds no config\.json"):
        load_student(folder)


def test_a_student_can_be_copied_and_moved(make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor]) -> None:
    import copy

    student, _ = student_of(make_teacher)
    twin, ids = copy.deepcopy(student), make_tokens(1, 20)
    assert torch.equal(logits(twin, ids), logits(student, ids))
    modules = [module for module in twin.modules() if isinstance(module, StudentAttention)]
    graft_of_twin = Graft(twin, {module.layer_idx: module for module in modules})
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    with graft_of_twin.as_teacher() as teacher:  # the copy's own projections, not those of the original
        assert torch.equal(logits(teacher, ids), logits(make_teacher(), ids))
    assert torch.isfinite(logits(twin.double(), ids)).all()


def test_remote_code_alone_loads_a_student(folder: Path, make_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    """In a process that never imports linearize by itself; what it saves loads again."""
    stub = "from linearize.modeling import LinearizedLlamaConfig, LinearizedLlamaForCausalLM\n"
    (folder / "modeling_linearized.py").write_text(stub)
    names = {"AutoConfig": "LinearizedLlamaConfig", "AutoModelForCausalLM": "LinearizedLlamaForCausalLM"}
    change_json(
        folder, lambda c: c.update(auto_map={auto: f"modeling_linearized.{name}" for auto, name in names.items()})
    )
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.split('.')[0] == 'linearize' for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.load(sys.argv[2])
torch.save(model(ids, use_cache=False).logits.detach(), sys.argv[2])
model.save_pretrained(sys.argv[3])
"""
    ids = make_tokens(1, 30)
    torch.save(ids, tmp_path / "tensor.pt")
    repo = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(repo), str(repo / "kernels")]),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    again = tmp_path / "again"
    arguments = [str(folder), str(tmp_path / "tensor.pt"), str(again)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = logits(load_student(folder), ids)
    torch.testing.assert_close(torch.load(tmp_path / "tensor.pt"), expected)
    assert torch.equal(logits(load_student(again), ids), expected)


@pytest.mark.parametrize("name", recipe_names())
def test_initial_values_survive_construction_and_loading(name: str, make_teacher: MakeTeacher, tmp_path: Path) -> None:
    """transformers' post_init would set every Linear anew, and does so without a word."""
    recipe, starts = load_recipe(name), []
    for seed in (0, 1):
        model = make_teacher()
        torch.manual_seed(seed)
        grafted = graft(model, plan_surgery(model, recipe.mixer))
        starts.append({path: parameter.clone() for path, parameter in grafted.mixer_parameters().items()})
    config = student_config(model.config, recipe.mixer, tuple(grafted.students))
    fresh = dict(STUDENT_CLASSES["llama"][1](config).named_parameters())
    for path, start in starts[0].items():
        if torch.equal(start, starts[1][path]):  # the same whatever the seed
            assert torch.equal(fresh[path], start), path
        elif start.numel() >= 500:
            assert 0.8 < fresh[path].std() / start.std() < 1.25, path
    student = as_exported(grafted, recipe.mixer)
    student.save_pretrained(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[path], start) for path, start in starts[1].items())
