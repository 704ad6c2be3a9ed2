"""What a model says."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.config import Config

PROMPT = "The history of the sea is the history of"


class Sampling(Config):
    """How to choose tokens: greedy at temperature 0, beams when `beams` is above 1."""

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    seed: int = 0


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], sampling: Sampling
) -> list[str]:
    """The continuations of a batch of prompts (left-padded), without the prompts themselves."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    finally:
        tokenizer.padding_side = side
    sample = sampling.temperature > 0
    torch.manual_seed(sampling.seed)
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sample else {}
    with torch.no_grad():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sample,
            num_beams=sampling.beams,
            pad_token_id=tokenizer.pad_token_id,
            **chosen,
        )
    length = inputs["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    return texts
