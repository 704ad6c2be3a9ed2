"""Decode a long text token by token with every recipe's mixer, and compare with reading it at once.

    python scripts/decode_long.py --model teacher.gguf --text heldout.parquet --tokens 32k

A student of the teacher's first layers, in fp32, its mixers moved off their start by noise. Prints, for each recipe,
the largest difference of hidden states between prefill and decoding (relative to the largest hidden state), the bytes
of decoding state at a quarter and at the end, the process's memory at both places, and tokens per second.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from linearize.cache import StudentCacheLayer
from linearize.config import parse_count
from linearize.data import heldout_from
from linearize.machine import choose_machine
from linearize.recipe import load_recipe, recipe_names
from linearize.surgery import graft, plan_surgery
from linearize.teacher import load_teacher

PIECE = 4096
"""Tokens of prefill at once: memory stays small, and pieces must equal the whole anyway."""


def student_of(model: PreTrainedModel, recipe_name: str) -> PreTrainedModel:
    """The model with every layer replaced, parameters of the mixers shaken."""
    grafted = graft(model, plan_surgery(model, load_recipe(recipe_name).mixer))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in grafted.mixer_parameters().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return grafted.model.eval()


def read(model: PreTrainedModel, ids_BT: Tensor, piece: int, marks: list[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Hidden states [T, D], and (bytes of state, bytes of memory) when the tokens in `marks` have been read."""
    cache, found, measured = DynamicCache(), [], []
    for start in range(0, ids_BT.shape[1], piece):
        output = model.base_model(ids_BT[:, start : start + piece], past_key_values=cache, use_cache=True)
        found.append(output.last_hidden_state[0])
        if start + piece in marks:
            layers = [layer for layer in cache.layers if isinstance(layer, StudentCacheLayer)]
            assert len(layers) == model.config.num_hidden_layers
            measured.append((sum(t.nbytes for layer in layers for t in layer.state or ()), _memory(ids_BT.device)))
    return torch.cat(found), measured


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@torch.no_grad()
def main() -> None:
    """Print one line a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", default="32k")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recipe", action="append")
    options = parser.parse_args()
    machine, tokens = choose_machine(None, "fp32"), parse_count(options.tokens)
    print("| recipe | difference | state at 1/4 | at the end | memory at 1/4 | at the end | tokens/s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.recipe or recipe_names():
        teacher = load_teacher(options.model, dtype=torch.float32, device=machine.device)
        teacher.model.base_model.layers = teacher.model.base_model.layers[: options.layers]  # type: ignore[index]
        teacher.model.config.num_hidden_layers = options.layers
        text = np.concatenate(list(heldout_from(options.text, None, teacher.tokenizer, tokens).values()))[:tokens]
        assert text.size == tokens, f"{text.size} tokens of text"
        ids_BT = torch.from_numpy(text.astype(np.int64))[None].to(machine.device)
        model = student_of(teacher.model, name)
        whole, _ = read(model, ids_BT, PIECE, [])
        began = time.perf_counter()
        steps, ((quarter, quarter_memory), (end, end_memory)) = read(model, ids_BT, 1, [tokens // 4, tokens])
        rate = tokens / (time.perf_counter() - began)
        difference = (steps - whole).abs().max() / whole.abs().max()
        megabytes = [f"{number / 1e6:.0f} MB" for number in (quarter_memory, end_memory)]
        print(
            f"| {name} | {difference:.1e} | {quarter:,} B | {end:,} B | {' | '.join(megabytes)} | {rate:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
