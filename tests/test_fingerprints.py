"""A fingerprint tells teachers apart by their weights and configuration, in whichever files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from linearize.errors import TeacherError
from linearize.fingerprint import fingerprint_of
from linearize.teacher_files import find_checkpoint
from tests.tiny_llama import edit_config, tiny_model


def fingerprint(model: Path) -> str:
    return fingerprint_of(find_checkpoint(str(model)))


def test_a_fingerprint_tells_every_tensor_and_the_configuration_apart(llama_copy: Path) -> None:
    file = llama_copy / "model.safetensors"
    weights, known = load_file(file), {fingerprint(llama_copy)}
    for name, tensor in weights.items():
        save_file({**weights, name: tensor + 1}, file)
        known.add(fingerprint(llama_copy))
    save_file({name: tensor for name, tensor in weights.items() if "norm" not in name}, file)
    known.add(fingerprint(llama_copy))
    edit_config(llama_copy, {"rms_norm_eps": 0.1})
    known.add(fingerprint(llama_copy))
    assert len(known) == len(weights) + 3


def test_a_fingerprint_is_of_tensors_in_whichever_files(llama_folder: Path, llama_copy: Path, tmp_path: Path) -> None:
    (llama_copy / "model.safetensors").unlink()
    tiny_model().save_pretrained(llama_copy, max_shard_size="100KB")
    assert len(list(llama_copy.glob("*.safetensors"))) > 2
    moved = Path(shutil.copytree(llama_copy, tmp_path / "moved"))
    assert fingerprint(llama_copy) == fingerprint(llama_folder) == fingerprint(moved)


def test_fingerprints_of_other_files(llama_copy: Path, gguf_file: Path) -> None:
    assert fingerprint(gguf_file) == f"sha256 {hashlib.sha256(gguf_file.read_bytes()).hexdigest()}"
    (llama_copy / "model.safetensors").rename(llama_copy / "pytorch_model.bin")
    known = fingerprint(llama_copy)
    content = (llama_copy / "pytorch_model.bin").read_bytes()
    (llama_copy / "pytorch_model.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(llama_copy) != known


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"])
def test_a_fingerprint_of_broken_weights(llama_copy: Path, content: bytes) -> None:
    (llama_copy / "model.safetensors").write_bytes(content)
    with pytest.raises(TeacherError, match=r"model\.safetensors: is no whole file of weights.*Check that the files"):
        fingerprint(llama_copy)
