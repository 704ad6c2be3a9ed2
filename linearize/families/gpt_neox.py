"""GPT-NeoX and Pythia: one projection laid out head by head; a part of each head rotates."""

from linearize.families.base import Fused, ModelFamily

GPT_NEOX = ModelFamily(
    model_type="gpt_neox",
    config_class="GPTNeoXConfig",
    causal_lm="GPTNeoXForCausalLM",
    examples=("EleutherAI/pythia-160m", "EleutherAI/pythia-1.4b"),
    special="one query_key_value, head by head; partial RoPE; attention beside the MLP",
    trunk="gpt_neox",
    layers="gpt_neox.layers",
    attention="attention",
    projections=Fused("query_key_value", "heads"),
    output="dense",
    key_heads=None,
    cache="layer_past",
    mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
