"""The seeding audit of `linearize plan --audit`: how near a student starts to its teacher, and whose heads it sees.

A student that starts far away, or on heads in another order, trains to something mediocre without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearize.data import heldout_from
from linearize.doctor import PASSAGE
from linearize.readings import TOKENS, LayerReading, read_layers
from linearize.surgery import Graft

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference between the teacher's attention and the same computed from the student's heads, by precision."""


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        text: what was read.
        tokens: how many tokens of it.
        layers: one reading a student layer.
        heads: what is known of the heads, by name: biases, q/k norm, RoPE.
        tolerance: for `LayerReading.recomputed`.
    """

    text: str
    tokens: int
    layers: tuple[LayerReading, ...]
    heads: dict[str, str]
    tolerance: float

    @property
    def misread(self) -> list[int]:
        """Layers whose attention cannot be recomputed from the heads that the student sees."""
        return [layer.layer for layer in self.layers if not layer.recomputed <= self.tolerance]

    @property
    def error(self) -> float:
        """Mean relative error over layers."""
        return sum(layer.error for layer in self.layers) / len(self.layers)


def audit(grafted: Graft, tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> Audit:
    """Read every student layer on sample text.

    Args:
        grafted: a graft that nothing has been trained of.
        tokenizer: the teacher's.
        text: a file or folder of text as `--data` takes it; None reads a passage that comes with linearize.

    Raises:
        DataError: for text that cannot be read.
    """
    input_ids_BT = sample(tokenizer, text)
    layers = read_layers(grafted, input_ids_BT)
    return Audit(
        text or "a passage of linearize's own",
        input_ids_BT.shape[1],
        tuple(layers),
        _heads(grafted),
        TOLERANCES[grafted.model.dtype],
    )


def sample(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Tensor:
    """Token ids [1, T], T at most TOKENS."""
    if text is None:
        ids: Sequence[int] = tokenizer(PASSAGE, add_special_tokens=False)["input_ids"][:TOKENS]
    else:
        ids = next(iter(heldout_from(text, None, tokenizer, TOKENS).values())).tolist()
    return torch.tensor(ids, dtype=torch.long)[None]


def _heads(grafted: Graft) -> dict[str, str]:
    """What the projections and the configuration say."""
    student = next(iter(grafted.students.values()))
    family = student.family
    weights = {name: dict(student.get_submodule(name).named_parameters(recurse=False)) for name in family.submodules}
    biased = [name for name, found in weights.items() if "bias" in found]
    norms = [name for name, _ in student.named_children() if "norm" in name]
    config = grafted.model.config
    rope: dict[str, Any] = config.to_dict().get("rope_parameters") or {}
    kind = rope.get("rope_type", "default") if family.positions == "rotary" else "none; positions are learned"
    settings = ", ".join(f"{key} {value}" for key, value in rope.items() if key not in ("rope_type", "type"))
    shapes = student.shapes
    return {
        "head order": f"{shapes.query_heads} query heads, {shapes.query_heads // shapes.key_heads} to a key/value head",
        "biases": ", ".join(biased) or "none",
        "q/k norm": ", ".join(norms) or "none",
        "RoPE": f"{kind} ({settings})" if settings else str(kind),
    }
