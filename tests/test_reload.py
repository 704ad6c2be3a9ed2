"""A student is loaded and used like any other model: pipeline, offloading, compile, PEFT, Trainer, few bits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from linearize.export import export_student, load_student
from linearize.mixers import MIXERS
from linearize.recipe import Recipe, load_recipe
from linearize.surgery import graft, plan_surgery

MakeTeacher = Callable[..., PreTrainedModel]
MakeTokens = Callable[..., Tensor]
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

RECIPES = {
    "hedgehog": ("hedgehog", ["mixer.features=8", "mixer.bias=true"]),
    "lawcat": ("lawcat", []),
    "lizard": ("lizard", ["mixer.window=8"]),
    "liger": ("liger", ["mixer.window=8"]),
    "lolcats": ("lolcats", ["mixer.window=8"]),
    "mamba2": ("mamba2-mimic", []),
    "gdn": ("gdn", []),
    "ahn": ("ahn", ["mixer.window=8"]),
    "swa": ("swa-sink", ["mixer.window=8"]),
}
"""A recipe for every mixer that has one."""


def recipe_of(mixer: str) -> Recipe:
    name, overrides = RECIPES[mixer]
    return load_recipe(name, overrides)


@pytest.fixture(scope="module")
def folder_of(
    make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function: mixer -> folder of a student whose mixers were moved off their start; layer 0 is softmax."""
    made: dict[str, Path] = {}

    def make(mixer: str) -> Path:
        if mixer not in made:
            recipe = recipe_of(mixer)
            model = make_teacher(num_hidden_layers=2, intermediate_size=128)  # bitsandbytes has blocks of 64
            grafted = graft(model, plan_surgery(model, recipe.mixer, (0,)))
            torch.manual_seed(5)
            with torch.no_grad():
                for parameter in grafted.mixer_parameters().values():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            made[mixer] = tmp_path_factory.mktemp(mixer)
            export_student(grafted, tokenizer, recipe, made[mixer])
        return made[mixer]

    return make


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def test_every_mixer_with_a_recipe_is_here() -> None:
    assert MIXERS.keys() - RECIPES.keys() == {"t2r", "taylor"}


def test_auto_config_and_pipeline(folder_of: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast) -> None:
    folder = folder_of("lizard")
    assert AutoConfig.from_pretrained(folder).linearize["layers"] == [1]
    writer = pipeline("text-generation", model=str(folder), device="cpu")
    (found,) = writer("w5 w9 w3", max_new_tokens=6, do_sample=False)
    ids = tokenizer("w5 w9 w3", return_tensors="pt").input_ids
    expected = load_student(folder).generate(ids, max_new_tokens=6, do_sample=False)
    written = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["generated_text"] == "w5 w9 w3" + written
    several = writer(["w5 w9 w3", "w7"], max_new_tokens=6, do_sample=False, batch_size=2)  # pads on the left
    assert several[0] == [found]


@pytest.mark.parametrize("mixer", RECIPES)
def test_a_student_whose_layers_are_offloaded(
    folder_of: Callable[[str], Path], make_tokens: MakeTokens, tmp_path: Path, mixer: str
) -> None:
    """The student layer lies on disk and comes to the CPU, part by part, when accelerate's hooks fetch it."""
    folder, ids = folder_of(mixer), make_tokens(2, 30)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path).eval()
    away = {name for name, parameter in loaded.named_parameters() if parameter.is_meta}
    assert any(name.startswith("model.layers.1.") for name in away)
    whole = load_student(folder)
    assert torch.equal(logits(loaded, ids), logits(whole, ids))
    asked = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **asked), whole.generate(ids, **asked))
    assert {name for name, parameter in loaded.named_parameters() if parameter.is_meta} == away  # given back


def test_device_map_auto(folder_of: Callable[[str], Path], make_tokens: MakeTokens, tmp_path: Path) -> None:
    folder, ids = folder_of("lizard"), make_tokens(2, 30)
    room = {"cpu": 120_000}  # bytes: not all of the model
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=room, offload_folder=tmp_path
    ).eval()
    assert "disk" in loaded.hf_device_map.values()
    assert not any(".self_attn" in place for place in loaded.hf_device_map)  # a layer stays in one place
    assert torch.equal(logits(loaded, ids), logits(load_student(folder), ids))


def test_guessing_ahead_is_refused_before_it_begins(folder_of: Callable[[str], Path], make_tokens: MakeTokens) -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        load_student(folder_of("lizard")).generate(make_tokens(1, 20), max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_compile_without_a_graph_break(folder_of: Callable[[str], Path], make_tokens: MakeTokens) -> None:
    """The whole forward is one graph; what the graph computes is what Python computes."""
    torch.compiler.reset()
    model, ids = load_student(folder_of("lizard")), make_tokens(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", RECIPES)
@torch.no_grad()
def test_every_student_layer_is_one_graph(folder_of: Callable[[str], Path], mixer: str) -> None:
    torch.compiler.reset()
    model = load_student(folder_of(mixer)).model
    x_BTD = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(3))
    places = model.rotary_emb(x_BTD, torch.arange(40)[None])
    layer = model.layers[1].self_attn
    found, _ = torch.compile(layer, fullgraph=True, backend="eager")(x_BTD, position_embeddings=places)
    torch.testing.assert_close(found, layer(x_BTD, position_embeddings=places)[0], rtol=1e-5, atol=1e-5)


def test_peft_on_top_of_a_student(folder_of: Callable[[str], Path], make_tokens: MakeTokens, tmp_path: Path) -> None:
    folder, ids = folder_of("lizard"), make_tokens(2, 20)
    adapted = get_peft_model(load_student(folder), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert moved
    assert all("lora_" in name for name in moved)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_student(folder), tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(adapted, ids))
    assert not torch.equal(logits(again, ids), logits(load_student(folder), ids))
    torch.testing.assert_close(logits(again.merge_and_unload(), ids), logits(adapted, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_trainer_tunes_a_student(
    folder_of: Callable[[str], Path], make_tokens: MakeTokens, tmp_path: Path, adapted: bool
) -> None:
    """transformers' own Trainer; what it saves is a student again, mixers included."""
    model: Any = load_student(folder_of("lizard"))
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    else:
        model.requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(8, 24)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(str(tmp_path / "tuned"))
    if not adapted:
        tuned = load_student(tmp_path / "tuned")
        assert torch.equal(logits(tuned, rows[0]["input_ids"][None]), logits(model.eval(), rows[0]["input_ids"][None]))


def test_continuous_batching_is_refused_in_words(folder_of: Callable[[str], Path]) -> None:
    """transformers would log an error for every request and return nothing for it."""
    with pytest.raises(RuntimeError, match=r"cannot run under continuous batching.*left-padded batches"):
        load_student(folder_of("lizard")).generate_batch([[5, 6, 7], [8]])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("mixer", RECIPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
@pytest.mark.parametrize("bits", [4, 8])
def test_loading_in_few_bits(
    folder_of: Callable[[str], Path], make_tokens: MakeTokens, mixer: str, bits: int, device: str
) -> None:
    """Projections and MLPs are quantised; mixers stay fp32, to the bit. The kernels multiply in less than fp32."""
    folder, ids = folder_of(mixer), make_tokens(2, 30).to(device)
    asked = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def load() -> Any:
        named: dict[str, Any] = {"quantization_config": asked, "device_map": device, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(folder, **named).eval()

    loaded, exact = load(), load_student(folder)
    for name, parameter in exact.named_parameters():
        if ".mixer." in name:
            assert torch.equal(loaded.get_parameter(name).cpu(), parameter), name
    small = {type(module).__name__ for name, module in loaded.named_modules() if name.endswith(("q_proj", "up_proj"))}
    assert small == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 34)
    found = logits(loaded, ids)
    same = logits(load().dequantize(), ids)  # the rounded weights in ordinary layers
    assert torch.nn.functional.cosine_similarity(found, same, dim=-1).mean() > (0.995 if bits == 4 else 0.98)
