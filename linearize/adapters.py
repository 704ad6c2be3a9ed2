"""LoRA through peft: put in, switched off, merged. The adapter lives inside the one model; there is no wrapper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearize.config import Config, Number
from linearize.errors import RecipeError
from linearize.families import ModelFamily, family_of
from linearize.surgery import base_model_type

ADAPTER = "student"


class LoraSettings(Config):
    """LoRA (arXiv 2106.09685) on chosen projections."""

    r: int = Field(8, ge=1)
    alpha: Number = Field(16, gt=0)
    dropout: Number = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        ("attention",),
        min_length=1,
        description="attention, mlp (the family's own projections there), or names of modules",
    )

    def names_in(self, family: ModelFamily) -> tuple[str, ...]:
        """Ends of module names; `attention` and `mlp` spelled out as the family calls them."""
        words = {
            "attention": tuple(f"{family.attention}.{name}" for name in family.submodules),
            "mlp": family.mlp,
        }
        return tuple(name for target in self.targets for name in words.get(target, (target,)))

    def spelled_out(self, family: ModelFamily) -> "LoraSettings":
        """The same settings, with the sorted names in place of words: equal where they adapt the same."""
        return self.model_copy(update={"targets": tuple(sorted(set(self.names_in(family))))})


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The adapted modules, in model order."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if f".{ADAPTER}." in name}


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Adapt every module whose name ends in one of `settings.targets`; in fp32, starting as no change.

    A second call with a model that has adapters goes on with them. The head over the vocabulary is no target: teacher
    and student share it.

    Raises:
        RecipeError: when a target names no module, or the model's adapters have other settings.
    """
    if lora_layers(model):
        _check_same(model, settings)
        return
    check_projections(model, settings)
    targets = settings.names_in(family_of(base_model_type(model)))
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    device = model.get_input_embeddings().weight.device  # the layer's own weights may be in host memory (streaming)
    assert isinstance(device, torch.device)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(device, torch.float32)


def check_projections(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Refuse targets that name no projection of a model.

    Raises:
        RecipeError: with the names that it has.
    """
    head = model.get_output_embeddings()
    names = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    targets = settings.names_in(family_of(base_model_type(model)))
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:
        leaves = sorted({name.rpartition(".")[2] for name in names})
        raise RecipeError(
            f"no projection is called {', '.join(unknown)}; this model has {', '.join(leaves)}",
            place="lora.targets",
            remedy="`attention` and `mlp` stand for the projections there, whatever a family calls them.",
        )


def _check_same(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Refuse settings that differ from those the model's adapters were made with."""
    config: LoraConfig = model.peft_config[ADAPTER]  # type: ignore[assignment]  # peft puts it there
    made = LoraSettings(
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=tuple(sorted(config.target_modules or ())),
    )
    if made != settings.spelled_out(family_of(base_model_type(model))):
        raise RecipeError(
            f"the model has adapters of an earlier stage with other settings: {made}",
            place="lora",
            remedy="Stages share their adapters: give every stage the same lora, or null.",
        )


@contextmanager
def adapters_off(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Inside, these adapted modules answer as before they were adapted.

    Sets the flag that peft's modules look at. Its own switch walks all parameters and unfreezes every adapter, which
    takes the host longer than a small teacher takes the GPU.
    """
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


@contextmanager
def inputs_uncast(layers: Sequence[LoraLayer], device: torch.device) -> Iterator[None]:
    """Inside and under autocast, adapters read their inputs as they are.

    peft widens an input to the fp32 of its adapter, and autocast rounds it again for the product: two passes over it,
    and a copy that is kept for the backward pass, for the same numbers.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def lora_off(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model's adapters change nothing. Afterwards all is as before."""
    return adapters_off(lora_layers(model))


def merge_lora(model: nn.Module) -> int:
    """Add the adapters into the base weights, in fp32, and put the plain modules back. Returns how many there were."""
    merged = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        assert isinstance(base, (nn.Linear, Conv1D))
        assert type(base) in (nn.Linear, Conv1D)  # quantised ones are plain again by now: see quantized.dequantize
        # peft's adapters of quantised layers are no subclass, but have the same method
        delta = cast(LoraLinear, module).get_delta_weight(ADAPTER)
        with torch.no_grad():
            base.weight.copy_((base.weight.float() + delta.float()).to(base.weight.dtype))
        model.set_submodule(name, base)
        merged += 1
    return merged
