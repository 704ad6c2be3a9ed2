"""The text model of Gemma 3. Sliding layers rotate by another base; the trunk hands each layer the right one."""

from linearize.families.base import ModelFamily, QueryKeyNorm, Window

GEMMA3 = ModelFamily(
    model_type="gemma3_text",
    config_class="Gemma3TextConfig",
    causal_lm="Gemma3ForCausalLM",
    examples=("google/gemma-3-1b-it",),
    special="RMS norm on q and k; 5 of 6 layers slide, with a RoPE base of their own",
    norm=QueryKeyNorm(),
    window=Window("layer_types"),
    reads_layer_types=True,
)
