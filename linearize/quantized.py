"""Teachers in 4 or 8 bits through bitsandbytes: smaller in memory while a student is trained beside them.

Only the frozen weights are quantised; mixers and adapters train in fp32 on top (QLoRA, arXiv 2305.14314). The exported
student is in the dtype of the activations again: its base weights are what the quantised ones stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from linearize.errors import TeacherError, unknown_name


def _four(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _eight(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


BLOCK = 64
"""Weights that share a scale in 4 bits: bitsandbytes' default."""

# name -> settings for a dtype of the activations. The head over the vocabulary stays as it is in both.
QUANTIZATIONS: dict[str, Callable[[torch.dtype], BitsAndBytesConfig]] = {"4bit": _four, "8bit": _eight}


def quantization(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings of a quantisation.

    Raises:
        TeacherError: there is none of that name, or bitsandbytes is not installed.
    """
    if name not in QUANTIZATIONS:
        raise TeacherError(unknown_name("quantisation", name, QUANTIZATIONS), place="--quantize")
    if find_spec("bitsandbytes") is None:
        raise TeacherError(
            "bitsandbytes is not installed, which quantises the teacher.",
            place=f"--quantize {name}",
            remedy="`pip install bitsandbytes` (0.46 or newer; on a CPU it is slow), or leave --quantize out.",
        )
    return QUANTIZATIONS[name](dtype)


def mend_four_bits_on_cpu(model: PreTrainedModel) -> None:
    """Work around what bitsandbytes (0.50.2) silently does wrong with 4-bit weights on CPUs; on a GPU, do nothing.

    In eval mode it repacks them where the CPU has AVX512-BF16: their product then has no backward, so that gradients
    are wrong, and they stay packed when the model is dequantised. That is switched off. And it reads wrong values where
    blocks of 64 do not divide the rows. Remove each part when it is mended upstream.

    Raises:
        TeacherError: a layer has such rows.
    """
    from bitsandbytes.nn import Linear4bit

    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if model.device.type != "cpu":
        return
    wrong = [f"{name} ({module.in_features})" for name, module in layers.items() if module.in_features % BLOCK]
    if wrong:
        raise TeacherError(
            f"{len(wrong)} layers have rows that blocks of {BLOCK} do not divide, such as {wrong[0]}: on a CPU "
            "bitsandbytes reads them wrongly.",
            place="--quantize 4bit",
            remedy="Use 8bit, a GPU, or leave --quantize out.",
        )
    for module in layers.values():
        module.support_avx512bf16_for_cpu = False


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether its weights are in bitsandbytes' formats."""
    return isinstance(vars(model.config).get("quantization_config"), BitsAndBytesConfig)


def dequantize(model: PreTrainedModel) -> None:
    """Put plain weights in the place of quantised ones, also below adapters, in place; nothing else changes.

    After 4 bits the outputs stay the same up to rounding. In 8 bits bitsandbytes also rounds activations, which a plain
    model does not.
    """
    if is_quantized(model):
        model.dequantize(model.dtype)
