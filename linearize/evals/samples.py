"""What a model says."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.config import Config
from linearize.distributed import is_sharded
from linearize.errors import RunError
from linearize.export import load_student, load_student_tokenizer
from linearize.machine import choose_machine
from linearize.reach import check_reach

PROMPT = "The history of the sea is the history of"


class Sampling(Config):
    """How to choose tokens: greedy at temperature 0, beams when `beams` is above 1."""

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    seed: int = 0


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    sampling: Sampling,
    *,
    special_tokens: bool = True,
) -> list[str]:
    """The continuations of a batch of prompts (left-padded), without the prompts themselves.

    Args:
        special_tokens: let the tokenizer add its own, such as bos; a chat template has spelt them already.

    Raises:
        RunError: a prompt has no tokens, or the model has a table of positions that ends before they would.
    """
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=special_tokens)
    finally:
        tokenizer.padding_side = side
    blank = [number for number, mask in enumerate(inputs["attention_mask"], 1) if not mask.any()]
    if blank:
        raise RunError("has no tokens to go on from", place=f"prompt {blank[0]}", remedy="Give it a word.")
    inputs = inputs.to(model.device)
    check_reach(model.config, inputs["input_ids"].shape[1], sampling.max_new_tokens)
    sample = sampling.temperature > 0
    torch.manual_seed(sampling.seed)
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sample else {}
    with torch.no_grad():
        tokens = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sample,
            num_beams=sampling.beams,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=is_sharded(model),  # none stops while another still gathers weights
            **chosen,
        )
    length = inputs["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    return texts


def generate_from_folder(
    folder: str, prompts: list[str], sampling: Sampling, chat: bool = False, device: str | None = None
) -> list[str]:
    """The continuations of prompts by a student on disk.

    Raises:
        RunError: for a folder without a student or its tokenizer, or `chat` with a tokenizer that has no template.
    """
    machine = choose_machine(device, "auto")
    model = load_student(folder, dtype=machine.dtype, device=str(machine.device))
    tokenizer = load_student_tokenizer(folder)
    if chat:
        if tokenizer.chat_template is None:
            raise RunError("its tokenizer has no chat template", place=folder, remedy="Leave out --chat.")
        prompts = [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
            )
            for prompt in prompts
        ]
    return generate_texts(model, tokenizer, prompts, sampling, special_tokens=not chat)
