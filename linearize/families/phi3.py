"""Phi-3 and Phi-4: one projection for q, k, v; the later ones rotate a part of each head."""

from linearize.families.base import Fused, ModelFamily, Window

PHI3 = ModelFamily(
    model_type="phi3",
    config_class="Phi3Config",
    causal_lm="Phi3ForCausalLM",
    examples=("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-4-mini-instruct"),
    special="one qkv_proj: all q, all k, all v; partial RoPE in Phi-4 mini; mini-4k slides",
    projections=Fused("qkv_proj", "blocks"),
    window=Window("all"),
    mlp=("mlp.gate_up_proj", "mlp.down_proj"),
)
