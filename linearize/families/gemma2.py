"""Gemma 2: capped scores, windows that alternate with full attention, head_dim a number of its own."""

from linearize.families.base import ModelFamily, Window

GEMMA2 = ModelFamily(
    model_type="gemma2",
    config_class="Gemma2Config",
    causal_lm="Gemma2ForCausalLM",
    examples=("google/gemma-2-2b",),
    special="scores capped by tanh; every other layer slides; scaled by query_pre_attn_scalar",
    soft_cap="attn_logit_softcapping",
    window=Window("layer_types"),
    reads_layer_types=True,
)
