"""Mistral 7B v0.2 and later (no sliding window)."""

from linearize.families.base import ModelFamily

MISTRAL = ModelFamily(
    model_type="mistral", config_class="MistralConfig", causal_lm="MistralForCausalLM", window="sliding_window"
)
