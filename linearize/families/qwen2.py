"""Qwen 2 and 2.5: biases on q, k and v."""

from linearize.families.base import ModelFamily, Window

QWEN2 = ModelFamily(
    model_type="qwen2",
    config_class="Qwen2Config",
    causal_lm="Qwen2ForCausalLM",
    examples=("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B-Instruct"),
    special="biases on q, k, v; a window in the last layers, where switched on",
    window=Window("layer_types"),
    reads_layer_types=True,
)
