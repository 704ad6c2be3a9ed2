"""Model families. One small file each; this table is the only place that lists them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from linearize.errors import SurgeryError, unknown_name
from linearize.families.base import Fused, ModelFamily, QueryKeyNorm, Split, Window
from linearize.families.gemma2 import GEMMA2
from linearize.families.gemma3 import GEMMA3
from linearize.families.gpt2 import GPT2
from linearize.families.gpt_neox import GPT_NEOX
from linearize.families.granite import GRANITE
from linearize.families.llama import LLAMA
from linearize.families.mistral import MISTRAL
from linearize.families.mixtral import MIXTRAL
from linearize.families.olmo2 import OLMO2
from linearize.families.phi3 import PHI3
from linearize.families.qwen2 import QWEN2
from linearize.families.qwen3 import QWEN3
from linearize.families.qwen3_moe import QWEN3_MOE
from linearize.families.smollm3 import SMOLLM3
from linearize.families.stablelm import STABLELM

__all__ = [
    "FAMILIES",
    "NOT_TEXT",
    "Fused",
    "ModelFamily",
    "QueryKeyNorm",
    "Split",
    "Window",
    "family_of",
    "has_experts",
    "rotations",
]

FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GEMMA2,
        GEMMA3,
        PHI3,
        GPT2,
        GPT_NEOX,
        OLMO2,
        SMOLLM3,
        GRANITE,
        STABLELM,
    )
}

NOT_TEXT: dict[str, str] = {"gemma3": "gemma3_text"}
"""Multimodal model types, and the family of the text model inside."""


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a router chooses which weights a token meets."""
    return not {"num_experts", "num_local_experts"}.isdisjoint(config.to_dict())


def rotations(config: PreTrainedConfig) -> set[str]:
    """The kinds of rotary angles, by transformers' names; layers of different kinds may have their own."""
    rope: dict[str, Any] = config.to_dict().get("rope_parameters") or {}
    each = [rope] if "rope_type" in rope else [own for own in rope.values() if isinstance(own, dict)]
    return {own["rope_type"] for own in each if "rope_type" in own}


def family_of(model_type: str) -> ModelFamily:
    """The family of a `config.model_type`.

    Raises:
        SurgeryError: when no family describes it; the known ones are listed.
    """
    if model_type in NOT_TEXT:
        raise SurgeryError(
            f"'{model_type}' reads images too; only its text model ('{NOT_TEXT[model_type]}') can be converted",
            place="config.model_type",
            remedy="Save the text model on its own first: docs/families.md shows how.",
        )
    if model_type not in FAMILIES:
        raise SurgeryError(
            unknown_name("model family", model_type, FAMILIES),
            place="config.model_type",
            remedy="A family is added as one file in linearize/families/.",
        )
    return FAMILIES[model_type]
