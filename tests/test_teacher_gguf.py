"""A tiny GGUF is the model that it was written from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.errors import TeacherError
from linearize.teacher import load_teacher
from tests.tiny_llama import TEMPLATE, TEXT, logits, tiny_model, tiny_tokenizer, write_gpt2_gguf


def test_gguf_equals_the_model_it_was_written_from(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = load_teacher(str(gguf_file))
    torch.testing.assert_close(logits(teacher.model), logits(tiny_model()))
    assert teacher.sha256 == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert teacher.origin == f"GGUF file tiny.F32.gguf (sha256 {teacher.sha256[:12]})"
    assert teacher.model.config.name_or_path == "tiny.F32.gguf"
    assert (teacher.model.generation_config.bos_token_id, teacher.model.generation_config.eos_token_id) == (1, 2)
    assert "GGUF tensors" not in capfd.readouterr().err


def test_gguf_teacher_saves_and_reloads(gguf_file: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(gguf_file), dtype=torch.bfloat16)
    teacher.model.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved
    assert "Some Odd Name" not in json.dumps(saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(teacher.model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = tiny_tokenizer()(TEXT).input_ids
    assert tokenizer(TEXT).input_ids == teacher.tokenizer(TEXT).input_ids == expected
    assert tokenizer.decode(expected) == TEXT
    assert tokenizer.chat_template == teacher.tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")


def test_weights_of_a_gguf_file_are_contiguous(tmp_path: Path) -> None:
    """The reader only turns GPT-2's: FSDP2 does not shard such weights, and NCCL does not send them."""
    written = write_gpt2_gguf(tmp_path / "gpt2.gguf")
    teacher = load_teacher(str(tmp_path / "gpt2.gguf"))
    assert all(parameter.is_contiguous() for parameter in teacher.model.parameters())
    torch.testing.assert_close(logits(teacher.model), logits(written))


@pytest.mark.parametrize("size", [0, 3, 100, 30_000])
def test_broken_gguf(size: int, gguf_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(TeacherError, match=r"broken\.gguf: its (config|weights) cannot be"):
        load_teacher(str(broken))
