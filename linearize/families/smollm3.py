"""SmolLM3: every fourth layer does not rotate."""

from linearize.families.base import ModelFamily, Window

SMOLLM3 = ModelFamily(
    model_type="smollm3",
    config_class="SmolLM3Config",
    causal_lm="SmolLM3ForCausalLM",
    examples=("HuggingFaceTB/SmolLM3-3B",),
    special="every fourth layer without RoPE",
    rope_layers="no_rope_layers",
    window=Window("layer_types"),
    reads_layer_types=True,
)
