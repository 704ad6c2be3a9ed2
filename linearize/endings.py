"""Where what a model writes ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's own settings name."""
    assert model.generation_config is not None, "causal language models have one"
    named = [model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id]
    flat = [end for entry in named for end in (entry if isinstance(entry, list) else [entry])]
    return sorted({int(end) for end in flat if end is not None})


def until_end(row: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """The row before its first ending token, and whether there is one."""
    place = next((index for index, token in enumerate(row) if token in ends), None)
    return (row, False) if place is None else (row[:place], True)
