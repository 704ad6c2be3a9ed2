"""Where attention lives in a Hugging Face model family, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFamily:
    """One `model_type` of transformers. Paths are attribute paths in the module tree.

    Attributes:
        model_type: `config.model_type` of the teacher.
        config_class: name of the configuration class in transformers.
        causal_lm: name of the language-model class in transformers.
        trunk: path of the decoder without the head; `forward` of that module gets the 2-D padding mask.
        layers: path of the list of decoder layers.
        attention: path of the attention module inside a layer.
        query, key, value, output: names of its projections.
        window: configuration field that holds a sliding window, which this family's attention would need to keep;
            None when the family has none.
    """

    model_type: str
    config_class: str
    causal_lm: str
    trunk: str = "model"
    layers: str = "model.layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    window: str | None = None
