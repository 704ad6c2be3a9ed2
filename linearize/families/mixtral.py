"""Mixtral: Mistral's attention; the experts stay as they are."""

from linearize.families.base import ModelFamily, Window

MIXTRAL = ModelFamily(
    model_type="mixtral",
    config_class="MixtralConfig",
    causal_lm="MixtralForCausalLM",
    examples=("mistralai/Mixtral-8x7B-v0.1",),
    special="experts beside attention, untouched",
    window=Window("all"),
    mlp=(),
)
