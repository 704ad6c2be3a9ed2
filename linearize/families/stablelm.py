"""StableLM: a part of each head rotates; some have a norm for each head, some biases on q, k, v."""

from linearize.families.base import ModelFamily, QueryKeyNorm

STABLELM = ModelFamily(
    model_type="stablelm",
    config_class="StableLmConfig",
    causal_lm="StableLmForCausalLM",
    examples=("stabilityai/stablelm-2-1_6b",),
    special="partial RoPE; in some a LayerNorm for each head, or biases on q, k, v",
    norm=QueryKeyNorm("q_layernorm", "k_layernorm", "each head", switch="qk_layernorm"),
    hands_on=False,
)
