"""Sharded checkpoints: no second copy in memory, none of the teacher's bytes changed, shards out as shards in."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from linearize import export
from linearize.adapters import LoraSettings, add_lora, lora_parameters
from linearize.export import export_student, load_student
from linearize.recipe import load_recipe
from linearize.surgery import graft, plan_surgery
from linearize.teacher import load_teacher

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "measure_checkpoint_memory.py"


@pytest.fixture
def sharded(make_teacher: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path: Path) -> Path:
    """A teacher in bf16 in several shards, with its tokenizer."""
    folder = tmp_path / "teacher"
    make_teacher().bfloat16().save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}


def test_shards_go_in_and_shards_come_out(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_SIZE", "60KB")
    seen: list[PreTrainedModel] = []
    save = export.save_model
    monkeypatch.setattr(export, "save_model", lambda student, folder: (seen.append(student), save(student, folder)))
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    recipe = load_recipe("hedgehog", ["mixer.features=8"])
    teacher = load_teacher(str(sharded), dtype=torch.bfloat16)
    grafted = graft(teacher.model, plan_surgery(teacher.model, recipe.mixer))
    add_lora(grafted.model, LoraSettings(r=2))
    with torch.no_grad():
        for parameter in lora_parameters(grafted.model).values():
            parameter.normal_(std=0.1)
    export_student(grafted, teacher.tokenizer, recipe, tmp_path / "student")

    (student,) = seen
    ours = dict(grafted.model.named_parameters())
    for name, parameter in student.named_parameters():
        assert parameter.data_ptr() == ours[name].data_ptr()  # written from where it lies
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before  # mapped files stay as they are
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    written, given = tensors(tmp_path / "student"), tensors(sharded)
    for name, value in given.items():
        adapted = any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
        assert torch.equal(written[name], value) != adapted
    loaded = load_student(tmp_path / "student")
    ids = torch.arange(2, 32)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, grafted.model(ids, use_cache=False).logits)


def test_no_weights_of_an_earlier_export_stay(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("swa-sink")
    for size, several in (("60KB", True), ("4GB", False), ("60KB", True)):
        monkeypatch.setattr(export, "SHARD_SIZE", size)
        teacher = load_teacher(str(sharded), dtype=torch.bfloat16)
        grafted = graft(teacher.model, plan_surgery(teacher.model, recipe.mixer))
        export_student(grafted, teacher.tokenizer, recipe, tmp_path / "student")
        names = {path.name for path in (tmp_path / "student").glob("model*.safetensors*")}
        assert ("model.safetensors" in names) != several
        assert ("model.safetensors.index.json" in names) == several
        load_student(tmp_path / "student")


def test_the_probe_of_a_large_head_is_that_of_the_whole(
    make_teacher: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_teacher()
    whole = export.probe(model)["logits"]
    monkeypatch.setattr(export, "HEAD_ROWS", 20)
    torch.testing.assert_close(export.probe(model)["logits"], whole, rtol=1e-6, atol=1e-6)
    assert "forward" not in vars(model.lm_head)


def test_the_script_that_measures_memory(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("measure_checkpoint_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_checkpoint(tmp_path / "teacher", "tiny")
    found = script.convert(tmp_path, "swa-sink")
    assert found["peak"] >= found["imports"] > 0
    assert found["weights"] > 0
