"""OLMo 2: the norms on q and k span all heads at once."""

from linearize.families.base import ModelFamily, QueryKeyNorm

OLMO2 = ModelFamily(
    model_type="olmo2",
    config_class="Olmo2Config",
    causal_lm="Olmo2ForCausalLM",
    examples=("allenai/OLMo-2-0425-1B",),
    special="RMS norm on q and k across all heads; norms after attention",
    norm=QueryKeyNorm(over="projection"),
)
