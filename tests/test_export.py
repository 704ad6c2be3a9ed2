"""What is written is what was trained, in a folder that anyone can load."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from linearize import export
from linearize.adapters import LoraSettings, add_lora, lora_layers, lora_parameters
from linearize.errors import RunError
from linearize.export import PROBE_FILE, export_student, load_student, probe, probe_logits
from linearize.recipe import Recipe, load_recipe
from linearize.surgery import Graft, KeepSoftmax, graft, plan_surgery

MakeTeacher = Callable[..., PreTrainedModel]
WRITTEN = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_linearized.py",
    "probe.safetensors",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("hedgehog", ["mixer.bias=true", "mixer.features=8"])


def trained(
    make_teacher: MakeTeacher,
    recipe: Recipe,
    keep: KeepSoftmax = "none",
    dtype: torch.dtype = torch.float32,
    **sizes: object,
) -> Graft:
    """A graft whose mixers and adapters have moved, as after training."""
    model = make_teacher(**sizes)
    for parameter in model.parameters():  # as from_pretrained does: model.to(dtype) would round RoPE's frequencies too
        parameter.data = parameter.data.to(dtype)
    grafted = graft(model, plan_surgery(model, recipe.mixer, keep))
    add_lora(model, LoraSettings(r=2))
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in [*grafted.mixer_parameters().values(), *lora_parameters(model).values()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return grafted


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("keep", ["none", (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_loaded_is_what_was_trained(
    make_teacher: MakeTeacher,
    make_tokens: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    tmp_path: Path,
    keep: KeepSoftmax,
    dtype: torch.dtype,
    tied: bool,
) -> None:
    grafted, ids = trained(make_teacher, recipe, keep, dtype, tie_word_embeddings=tied), make_tokens(2, 70)
    before = logits(grafted.model, ids)
    export_student(grafted, tokenizer, recipe, tmp_path)
    assert not lora_layers(grafted.model)  # merged
    if dtype == torch.float32:
        torch.testing.assert_close(logits(grafted.model, ids), before, rtol=1e-5, atol=1e-5)
    for loaded in (load_student(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert loaded.dtype == dtype
        assert torch.equal(logits(loaded, ids), logits(grafted.model, ids))
        asked = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **asked), grafted.model.generate(ids, **asked))
    shared = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert shared == tied
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if ".mixer." in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if ".mixer." not in name} == {dtype}
    assert not any("lora" in name or "base_layer" in name for name in tensors)


def test_the_folder_holds_everything(
    make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("kept")
    export_student(trained(make_teacher, recipe), tokenizer, recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN | {"run"}
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "kept"
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w9").input_ids == tokenizer("w5 w9").input_ids
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["linearize"]["mixer"] == recipe.mixer.model_dump(mode="json")
    assert "peft" not in json.dumps(config)
    code = (tmp_path / "modeling_linearized.py").read_text()
    compile(code, "modeling_linearized.py", "exec")
    for name in config["auto_map"].values():
        module, _, class_name = name.partition(".")
        assert module == "modeling_linearized"
        assert f"{class_name}" in code.splitlines()[-1]


def test_files_are_readable_as_the_umask_says(
    make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, tmp_path: Path
) -> None:
    export_student(trained(make_teacher, recipe), tokenizer, recipe, tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in WRITTEN} == {0o666 & ~mask}


def test_the_probe_is_that_of_the_trained_student(
    make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, tmp_path: Path
) -> None:
    grafted = trained(make_teacher, recipe)
    export_student(grafted, tokenizer, recipe, tmp_path)
    known = load_file(tmp_path / PROBE_FILE)
    ids, entries = known["input_ids"], known["entries"]
    assert torch.equal(known["logits"], logits(grafted.model, ids)[0, -4:][:, entries])
    found = probe_logits(load_student(tmp_path), ids, entries)
    assert torch.equal(found, known["logits"])
    assert entries.unique().numel() == entries.numel() == 97
    other = trained(make_teacher, recipe, keep=(0,))
    assert not torch.allclose(probe_logits(other.model, ids, entries), known["logits"], atol=1e-2)


def test_the_probe_changes_nothing(make_teacher: MakeTeacher) -> None:
    model = make_teacher(attention_dropout=0.5)
    random_state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        first, second = probe(model), probe(model)
        assert model.training == training
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_exporting_again_replaces_the_student(
    make_teacher: MakeTeacher,
    make_tokens: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    tmp_path: Path,
) -> None:
    export_student(trained(make_teacher, recipe), tokenizer, recipe, tmp_path)
    other, ids = trained(make_teacher, recipe, keep=(0, 1)), make_tokens(1, 30)
    export_student(other, tokenizer, recipe, tmp_path)
    assert torch.equal(logits(load_student(tmp_path), ids), logits(other.model, ids))


@pytest.mark.parametrize("where", ["save_model", "save_file", "write_text"])
def test_a_full_disk_leaves_no_student_that_looks_whole(
    make_teacher: MakeTeacher,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def full(*_args: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if where == "write_text" else export, where, full)
    with pytest.raises(RunError, match=r"could not be written: .*No space left on device.*--resume"):
        export_student(trained(make_teacher, recipe), tokenizer, recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_config_comes_last(
    make_teacher: MakeTeacher,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b))[1])
    export_student(trained(make_teacher, recipe), tokenizer, recipe, tmp_path)
    assert moved[-1] == "config.json"
    assert set(moved) == WRITTEN


def test_the_teachers_generation_settings_go_along(
    make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, tmp_path: Path
) -> None:
    grafted = trained(make_teacher, recipe)
    grafted.model.generation_config.temperature = 0.3
    grafted.model.generation_config.do_sample = True
    export_student(grafted, tokenizer, recipe, tmp_path)
    assert load_student(tmp_path).generation_config.temperature == 0.3


@pytest.mark.parametrize("broken", ["nothing", "folder"])
def test_a_place_without_a_student(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path if broken == "folder" else tmp_path / "nowhere"
    with pytest.raises(RunError, match=str(place)):
        load_student(place)
