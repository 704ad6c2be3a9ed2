"""GPT-2: positions are learned and added to the embeddings, so sequences end at `n_positions`."""

from linearize.families.base import Fused, ModelFamily

GPT2 = ModelFamily(
    model_type="gpt2",
    config_class="GPT2Config",
    causal_lm="GPT2LMHeadModel",
    examples=("openai-community/gpt2",),
    special="learned positions; one c_attn, a Conv1D",
    trunk="transformer",
    layers="transformer.h",
    attention="attn",
    projections=Fused("c_attn", "blocks"),
    output="c_proj",
    linear="Conv1D",
    idle=("attn_dropout", "resid_dropout"),
    key_heads=None,
    positions="learned",
    mlp=("mlp.c_fc", "mlp.c_proj"),
)
