"""Teachers from folders, and what is refused before weights are read; models shipped by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import BertConfig, Gemma2Config, LlamaConfig, MistralConfig, T5Config
from transformers.utils import logging as hf_logging

from linearize.errors import TeacherError
from linearize.paths import cache_folder, shipped
from linearize.teacher import choose_attention, load_teacher
from linearize.teacher_files import known_models, read_model_config
from tests.tiny_llama import edit_config, logits, tiny_model

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


def test_folder_is_loaded_and_frozen(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "linearize")
    bars, hub_hidden = hf_logging.is_progress_bar_enabled(), huggingface_hub.utils.are_progress_bars_disabled()
    teacher = load_teacher(str(llama_folder))
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.model.dtype == torch.float32
    assert teacher.model.config.use_cache
    assert teacher.model.config.name_or_path == teacher.tokenizer.name_or_path == "tiny-llama"
    assert (teacher.revision, teacher.sha256) == (None, None)
    assert teacher.origin == f"folder {llama_folder}"
    assert teacher.attention == "sdpa: flash-attn needs cuda, the device is cpu"
    assert teacher.tokenizer.pad_token == "</s>"
    assert "padding with its eos token </s>" in caplog.text
    assert caplog.text.count("attention: sdpa") == 1
    assert hf_logging.is_progress_bar_enabled() == bars
    assert huggingface_hub.utils.are_progress_bars_disabled() == hub_hidden
    torch.testing.assert_close(logits(teacher.model), logits(tiny_model()))


def test_dtype_and_attention_are_honoured(llama_folder: Path) -> None:
    teacher = load_teacher(str(llama_folder), dtype=torch.bfloat16, attention="eager")
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
def test_configs_that_are_refused_before_weights(llama_copy: Path, changes: dict, message: str) -> None:
    (llama_copy / "model.safetensors").unlink()  # reading the weights would fail first
    edit_config(llama_copy, changes)
    with pytest.raises(TeacherError, match=message):
        load_teacher(str(llama_copy))


def test_config_that_is_no_json(llama_copy: Path) -> None:
    (llama_copy / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="config cannot be read"):
        load_teacher(str(llama_copy))


def test_folder_without_tokenizer(llama_copy: Path) -> None:
    for file in llama_copy.glob("*token*"):
        file.unlink()
    with pytest.raises(TeacherError, match=r"copy: has no tokenizer \(looked for tokenizer\.json"):
        load_teacher(str(llama_copy))


def test_broken_tokenizer(llama_copy: Path) -> None:
    (llama_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(TeacherError, match="tokenizer cannot be loaded"):
        load_teacher(str(llama_copy))


def test_tokenizer_with_neither_pad_nor_eos(llama_copy: Path) -> None:
    path = llama_copy / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    (llama_copy / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(TeacherError, match="neither a pad nor an eos token"):
        load_teacher(str(llama_copy))


def test_missing_and_truncated_weights(llama_copy: Path) -> None:
    edit_config(llama_copy, {"num_hidden_layers": 3})
    with pytest.raises(TeacherError, match=r"has no weights for \d+ tensors, such as model\.layers\.2\."):
        load_teacher(str(llama_copy))
    weights = llama_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(TeacherError, match="weights cannot be loaded"):
        load_teacher(str(llama_copy))
    weights.unlink()
    with pytest.raises(TeacherError, match="weights cannot be loaded"):
        load_teacher(str(llama_copy))


def test_weights_of_another_shape(llama_copy: Path) -> None:
    edit_config(llama_copy, {"vocab_size": 300})
    with pytest.raises(TeacherError, match="weights cannot be loaded"):
        load_teacher(str(llama_copy))
