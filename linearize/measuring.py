"""How a teacher and its student are measured: perplexities by source, a sample, and what layers do in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.evals.perplexity import Autocast, perplexity
from linearize.evals.samples import PROMPT, Sampling, generate_texts
from linearize.readings import Monitor
from linearize.surgery import Graft
from linearize.text import Heldout

EVAL_ROWS = {"cpu": 1, "cuda": 8}
"""Windows that are read at one time when perplexity is measured."""


@dataclass(frozen=True)
class Measured:
    """A model on the held-out text: perplexity by source, and a greedy continuation of PROMPT."""

    perplexity: dict[str, float]
    sample: str


@dataclass(frozen=True)
class Converted:
    """What came of a conversion.

    Attributes:
        folder: the student, an ordinary Hugging Face folder.
        length: tokens per held-out window.
        teacher: measured before anything was changed.
        untrained: perplexities of the student before its first step.
        stages: of each stage its name, tokens, seconds, tokens per second, peak memory, and the perplexities after it.
        student: measured after it was written to disk and loaded again.
    """

    folder: Path
    length: int
    teacher: Measured
    untrained: dict[str, float]
    stages: list[dict[str, Any]]
    student: Measured


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: Heldout) -> Measured:
    """A teacher, or a student that is not in training."""
    (sample,) = generate_texts(model, tokenizer, [PROMPT], Sampling())
    return Measured(_perplexities(model, heldout), sample)


def measure_in_training(grafted: Graft, heldout: Heldout) -> dict[str, float]:
    """Perplexity by source during training: base weights that train are fp32 then, and run under autocast."""
    mixed = partial(torch.autocast, grafted.model.device.type, torch.bfloat16, enabled=bool(grafted.raised))
    return _perplexities(grafted.model, heldout, mixed)


def evaluation(grafted: Graft, heldout: Heldout, warn: Callable[[str], None]) -> Callable[[], dict[str, float]]:
    """What measures a student in training: perplexities, and the readings of its layers on the first window."""
    monitor = Monitor(grafted, heldout.first_window, warn)
    return lambda: {**measure_in_training(grafted, heldout), **monitor()}


def _perplexities(model: PreTrainedModel, heldout: Heldout, autocast: Autocast = nullcontext) -> dict[str, float]:
    """Perplexity by source."""
    length, rows = heldout.length, EVAL_ROWS[model.device.type]

    def measured(tokens: np.ndarray) -> float:
        found = perplexity(model, tokens, length=length, max_tokens=tokens.size, batch_rows=rows, autocast=autocast)
        return found.perplexity

    return {source: measured(tokens) for source, tokens in heldout.tokens.items()}
