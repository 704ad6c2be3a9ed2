"""From hidden states to logits, as a family's language-model head does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]

LOGIT_RULES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2 to 4
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
}
"""What some families do to logits after the output embedding, by the key of their configuration."""


def head_of(model: PreTrainedModel) -> Head:
    """The output embedding, followed by what the family does to its logits (LOGIT_RULES)."""
    embedding = model.get_output_embeddings()
    config = model.config.get_text_config().to_dict()
    rules = [(rule, config[key]) for key, rule in LOGIT_RULES.items() if key in config and config[key] is not None]

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = embedding(hidden)
        for rule, value in rules:
            logits = rule(logits, value)
        return logits

    return head
