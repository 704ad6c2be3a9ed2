"""Predicted memory against what torch's own allocator reports, and against sums by hand."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_families import tiny_teacher
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.live_memory import LiveMemory
from linearize.memory import Target, predict_memory, unpredictable
from linearize.mixers import MIXERS
from linearize.planning import Prediction, predict_conversion, prediction_target
from linearize.recipe import Recipe, load_recipe
from linearize.stages import Batch, build_stage
from linearize.stages.distil import DistilConfig
from linearize.streaming import stream_layers
from linearize.surgery import graft, plan_surgery, with_frozen_teacher
from linearize.tables import prediction_report

CPU = Target("cpu", "fp32")
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def recipe_of(*overrides: str) -> Recipe:
    sizes = [
        f"stages.{stage}.{size}"
        for stage in (0, 1)
        for size in ("length=96", "batch=2", "micro_batch=2", "tokens=1000")
    ]
    return load_recipe("hedgehog", (*sizes, *overrides))


def living() -> int:
    """Bytes of all CPU tensors that Python knows, without what earlier tests left behind in cycles."""
    gc.collect()
    found = (x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu")
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in found}.values())


def peak_of(step: Callable[[], None]) -> int:
    """The most bytes that torch's allocator held during a call: what was there, and what its profiler saw."""
    live = peak = living()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measured(config: LlamaConfig, recipe: Recipe, streamed: bool) -> Iterator[int]:
    """The peak of the second step of every stage, by its own parts: no loop, no checkpoint."""
    already = living()
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    stream = stream_layers(model, torch.device("cpu")) if streamed else None
    grafted = graft(model, plan_surgery(model, recipe.mixer, recipe.keep_softmax))
    if recipe.needs_frozen_teacher:
        grafted = with_frozen_teacher(grafted)
    grafted = replace(grafted, stream=stream)
    for stage_config in recipe.stages:
        if streamed and isinstance(stage_config, DistilConfig):
            stage_config = stage_config.model_copy(update={"checkpoint_activations": True})
        grafted.model.requires_grad_(False)
        stage = build_stage(stage_config, grafted)
        parameters = list(stage.trainable().values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, foreach=False)

        def step(stage: Any = stage, optimizer: Any = optimizer) -> None:
            for _ in range(stage.config.accumulation):
                ids_BT = torch.randint(0, 512, (min(2, stage.config.micro_batch), 96))
                segments_BT = (torch.arange(96) >= 40).long().expand_as(ids_BT).contiguous()
                positions_BT = torch.arange(96).expand_as(ids_BT) - 40 * segments_BT
                batch = Batch(ids_BT, positions_BT, segments_BT, torch.ones_like(ids_BT, dtype=torch.bool))
                stage.train_micro_batch(batch, lambda loss: loss.backward())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        yield peak_of(step) - already - (stream.host_bytes if stream else 0)


CASES: dict[str, tuple[tuple[str, ...], bool, int]] = {
    "plain": ((), False, 5),
    "recomputed": (("stages.1.checkpoint_activations=true", "stages.1.micro_batch=1"), False, 5),
    "streamed": ((), True, 5),
    "every second layer": (("keep_softmax={every: 2}",), False, 6),
    "base weights of all layers": (("stages.1.train=[mixer, o]", "stages.1.lora=null", "keep_softmax=[1]"), False, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_predicted_memory_is_what_the_allocator_holds(case: str) -> None:
    """Within 3 %, though decoders are traced at two small depths."""
    overrides, streamed, layers = CASES[case]
    config = LlamaConfig(**SIZES, num_hidden_layers=layers)
    recipe = recipe_of(*overrides)
    predicted = predict_memory(config, recipe, Target("cpu", "fp32", streamed))
    for stage, peak in zip(predicted, measured(config, recipe, streamed), strict=True):
        assert stage.peak == pytest.approx(peak, rel=0.03), (stage, peak)


LAYERED: dict[str, tuple[dict[str, Any], int]] = {
    "gemma2": ({"sliding_window": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9}, 7),
    "gemma3_text": ({"sliding_window": 16}, 14),  # five of six layers slide
    "qwen2": ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, 5),
    "smollm3": ({"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0, 1]}, 9),
}


@pytest.mark.parametrize("family", LAYERED)
def test_memory_of_families_whose_layers_differ(family: str) -> None:
    """The small depths keep the pattern of the layers, and what a family's attention runs on."""
    special, layers = LAYERED[family]
    teacher = tiny_teacher(family, **{"layer_types": None, **special, "num_hidden_layers": layers})
    whole = predict_memory(teacher.config, recipe_of(), CPU)
    every = tuple(range(layers))
    kept = tuple(sorted(set(every) - {swap.layer for swap in plan_surgery(teacher, recipe_of().mixer)}))
    traced = predict_memory(teacher.config, recipe_of().model_copy(update={"keep_softmax": kept}), CPU)
    for stage, all_of_it in zip(whole, traced, strict=True):
        assert stage.peak == pytest.approx(all_of_it.peak, rel=0.03)


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind not in ("liger", "swa")])
def test_every_mixer_is_traced_as_on_a_gpu(kind: str) -> None:
    """Its kernels' gradients, and those of recomputed layers, go through torch's dispatcher; nothing is launched."""
    pytest.importorskip("triton")
    recipe = recipe_of("stages.1.checkpoint_activations=true")
    recipe = recipe.model_copy(update={"mixer": MIXERS[kind].config()})
    transfer, distil = predict_memory(LlamaConfig(**SIZES, num_hidden_layers=2), recipe, Target())
    assert 0 < transfer.peak < 2**28
    assert 0 < distil.peak < 2**28


def test_what_stays_is_counted_by_hand() -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=2)
    transfer, distil = predict_memory(config, recipe_of(), CPU)
    mixers = 2 * 2 * 4 * 16 * 16 * 4  # layers, maps, heads, weights of a head, bytes
    assert transfer.terms["mixers"] == mixers
    assert transfer.terms["AdamW moments"] == 2 * mixers
    assert "adapters" not in transfer.terms
    assert distil.terms["AdamW moments"] == 2 * (mixers + distil.terms["adapters"])
    layer = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 2 * 128)  # a norm of 256 bytes takes 512
    assert transfer.terms["base weights"] == 2 * layer + 4 * (2 * 512 * 64 + 128)
    streamed, _ = predict_memory(config, recipe_of(), Target("cpu", "fp32", streamed=True))
    assert streamed.terms["two streamed layers"] == 2 * layer
    assert sum(transfer.terms.values()) == transfer.peak


def test_live_memory_follows_storages() -> None:
    given = torch.ones(1000)
    with LiveMemory([given]) as memory:
        assert memory.live == 4096
        doubled = given * 2
        view = doubled[10:].view(-1, 2)
        assert memory.live == 8192
        given.add_(1)
        del doubled
        assert memory.live == 8192  # the view keeps it
        del view
        assert memory.live == 4096
        torch.empty(256)
    assert (memory.live, memory.peak) == (4096, 8192)


def test_a_prediction_needs_a_configuration_alone(tmp_path: Any) -> None:
    LlamaConfig(**SIZES, num_hidden_layers=3, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    target = prediction_target(None, recipe_of(), streamed=True)
    assert target == Target("cuda", "bf16", True)
    assert prediction_target("cpu", recipe_of(), streamed=False) == CPU
    found = predict_conversion(str(tmp_path / "config.json"), recipe_of(), target, Console(quiet=True))
    assert isinstance(found, Prediction)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(prediction_report(found))
    text = console.export_text()
    assert "two streamed layers" in text
    assert "0 transfer" in text
    assert "together" in text


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_fp32_are_not_predicted(family: str) -> None:
    config = tiny_teacher(family).config
    assert "experts" in unpredictable(config, CPU)
    assert not unpredictable(config, Target("cuda", "bf16"))
