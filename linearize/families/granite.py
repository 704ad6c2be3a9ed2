"""Granite 3: scores are scaled by a number of the configuration."""

from linearize.families.base import ModelFamily

GRANITE = ModelFamily(
    model_type="granite",
    config_class="GraniteConfig",
    causal_lm="GraniteForCausalLM",
    examples=("ibm-granite/granite-3.3-2b-instruct",),
    special="scores scaled by attention_multiplier, logits by logits_scaling",
)
