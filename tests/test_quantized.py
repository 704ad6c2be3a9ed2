"""Quantised teachers: refusals everywhere; with bitsandbytes also loading, LoRA on top, export, and a whole run."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from linearize import quantized
from linearize.adapters import LoraSettings, add_lora, lora_off, lora_parameters, merge_lora
from linearize.distributed import ALONE
from linearize.errors import RecipeError, RunError, TeacherError
from linearize.export import load_student
from linearize.job import Conversion
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.pipeline import convert
from linearize.quantized import dequantize, is_quantized
from linearize.sharding import shard_layers
from linearize.surgery import graft, plan_surgery
from linearize.target_cache import teacher_digest
from linearize.teacher import load_teacher

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
BITS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def folder(make_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    make_teacher(vocab_size=257, intermediate_size=128, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    return folder


def test_what_is_missing_or_unknown_is_said(folder, monkeypatch):
    with pytest.raises(TeacherError, match="unknown quantisation '3bit'; did you mean '[48]bit'"):
        load_teacher(str(folder), quantize="3bit")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"--quantize 4bit: bitsandbytes is not installed.*pip install"):
        load_teacher(str(folder), quantize="4bit")


def test_quantised_layers_are_not_sharded(make_teacher):
    """FSDP2 cuts plain weights only; and the whole student would be put together from a teacher that is not rounded."""
    model = make_teacher()
    model.config.quantization_config = quantized.QUANTIZATIONS["8bit"](torch.float32)
    with pytest.raises(RunError, match=r"--split fsdp: quantised weights cannot be sharded"):
        shard_layers(model, torch.device("cpu"), ALONE)


def test_a_gguf_file_is_unpacked_not_quantised(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: True)
    file = tmp_path / "teacher.gguf"
    file.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(TeacherError, match="is a GGUF file: its weights are unpacked"):
        load_teacher(str(file), quantize="8bit")


def test_stages_that_train_base_weights_are_refused(folder, tmp_path):
    job = Conversion(
        str(folder), out=tmp_path / "out", quantize="4bit", overrides=("stages.1.train=[all]", "stages.1.lora=null")
    )
    with pytest.raises(RecipeError, match=r"stages.1.train: all would train weights of the teacher.*mixer and lora"):
        convert(job, Console(quiet=True))


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_loaded_and_unpacked_again(folder, bits, device):
    plain, small = load_teacher(str(folder)).model, load_teacher(str(folder), quantize=bits, device=device).model
    assert is_quantized(small)
    assert not is_quantized(plain)
    assert small.device.type == device
    weight = small.get_submodule("model.layers.0.mlp.up_proj").weight
    assert weight.dtype in (torch.uint8, torch.int8)
    assert not weight.requires_grad
    assert type(small.get_output_embeddings()) is nn.Linear
    assert teacher_digest(small) == teacher_digest(load_teacher(str(folder), quantize=bits, device=device).model)
    ids = torch.arange(2, 60)[None]
    found = small(ids.to(device)).logits.cpu()
    dequantize(small)
    for name, weight in plain.named_parameters():  # NF4 in blocks of 64 errs by about 0.09 of normal weights' size
        error = (small.get_parameter(name).cpu() - weight).norm() / weight.norm()
        assert error < (0.15 if bits == "4bit" else 0.02), name
    assert not is_quantized(small)
    again = small(ids.to(device)).logits.cpu()
    if bits == "4bit":
        torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)
    else:  # activations were rounded to 8 bits as well
        assert (again - found).norm() < 0.1 * found.norm()


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_adapters_train_on_top_and_merge_into_plain_weights(folder, bits, device):
    model = load_teacher(str(folder), quantize=bits, device=device).model
    grafted = graft(model, plan_surgery(model, HedgehogConfig()))
    model.requires_grad_(False)
    add_lora(model, LoraSettings(r=4))
    ids = torch.arange(2, 40, device=device)[None]
    torch.manual_seed(0)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.05).requires_grad_(True)
    with torch.no_grad():
        model(ids)
    model(ids).logits.square().mean().backward()
    gradients = [parameter.grad for parameter in lora_parameters(model).values()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    model.requires_grad_(False)
    adapted = model(ids).logits
    with lora_off(model):
        assert (model(ids).logits - adapted).abs().max() > 1e-3
    dequantize(model)
    for parameter in lora_parameters(model).values():
        parameter.grad = None
        parameter.requires_grad_(True)
    model(ids).logits.square().mean().backward()
    if bits == "4bit":  # the same gradients as on plain weights
        for parameter, gradient in zip(lora_parameters(model).values(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    model.requires_grad_(False)
    plain = model(ids).logits
    assert merge_lora(model) == 4 * len(grafted.students)
    merged = model(ids).logits
    torch.testing.assert_close(merged, plain, rtol=1e-3, atol=1e-3)
    if bits == "4bit":
        torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-3)
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))


@needs_bitsandbytes
def test_rows_that_are_read_wrongly_on_a_cpu_are_refused(folder, make_teacher, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(folder, narrow)
    make_teacher(vocab_size=257, intermediate_size=96, eos_token_id=0, bos_token_id=0).save_pretrained(narrow)
    with pytest.raises(TeacherError, match=r"3 layers have rows .* 64 do not divide.*down_proj \(96\)"):
        load_teacher(str(narrow), quantize="4bit")
    assert is_quantized(load_teacher(str(narrow), quantize="8bit").model)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_a_whole_run_exports_plain_weights(folder, tmp_path, bits):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} lines of plain text are here, and {n * n} words." for n in range(200)))
    short = [f"stages.{i}.{value}" for i in (0, 1) for value in ("length=32", "batch=2", "micro_batch=1", "tokens=128")]
    job = Conversion(
        str(folder),
        data=str(text),
        out=tmp_path / "out",
        quantize=bits,
        device="cpu",
        overrides=(*short, "heldout_tokens=256", "precision=fp32"),
    )
    done = convert(job, Console(quiet=True))
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config
    student = load_student(done.folder)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(done.folder) is not None
    assert json.loads((done.folder / "metrics.json").read_text())["quantize"] == bits
    with pytest.raises(RunError, match="another quantize"):
        convert(Conversion(**{**vars(job), "quantize": None, "resume": True}), Console(quiet=True))
