"""Qwen 3's mixture of experts: its attention is Qwen 3's; the experts stay as they are."""

from linearize.families.base import ModelFamily, QueryKeyNorm, Window

QWEN3_MOE = ModelFamily(
    model_type="qwen3_moe",
    config_class="Qwen3MoeConfig",
    causal_lm="Qwen3MoeForCausalLM",
    examples=("Qwen/Qwen3-30B-A3B",),
    special="Qwen 3's attention; experts untouched",
    norm=QueryKeyNorm(),
    window=Window("all"),
    mlp=(),
)
