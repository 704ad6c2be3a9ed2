"""Mistral 7B: a sliding window in v0.1, none since v0.2."""

from linearize.families.base import ModelFamily, Window

MISTRAL = ModelFamily(
    model_type="mistral",
    config_class="MistralConfig",
    causal_lm="MistralForCausalLM",
    examples=("mistralai/Mistral-7B-v0.3",),
    special="v0.1 slides over a window in every layer",
    window=Window("all"),
)
