"""Qwen 3: norms on q and k, head by head."""

from linearize.families.base import ModelFamily, QueryKeyNorm, Window

QWEN3 = ModelFamily(
    model_type="qwen3",
    config_class="Qwen3Config",
    causal_lm="Qwen3ForCausalLM",
    examples=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
    special="RMS norm on q and k of each head; head_dim a number of its own",
    norm=QueryKeyNorm(),
    window=Window("layer_types"),
    reads_layer_types=True,
)
