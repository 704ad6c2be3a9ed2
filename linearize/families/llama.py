"""Llama 1 to 3.3, and what shares its module tree (SmolLM2, TinyLlama, ...)."""

from linearize.families.base import ModelFamily

LLAMA = ModelFamily(
    model_type="llama",
    config_class="LlamaConfig",
    causal_lm="LlamaForCausalLM",
    examples=("meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    special="the plain form: q, k, v, o, RoPE on whole heads, scaled as its configuration says",
)
