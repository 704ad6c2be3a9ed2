"""Draw tokens with random numbers that belong to a document and a place in it, whatever batch the document is in.

Shape legend: B rows, S steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from linearize.errors import TeacherError


def uniforms(seed: int, documents: Sequence[int], turn: int, steps: int) -> Tensor:
    """float32 [B, S] in [0, 1): row i depends on the seed, document i and the turn alone, its beginning not on S."""
    rows = [np.random.default_rng([seed, document, turn]).random(steps, dtype=np.float32) for document in documents]
    return torch.from_numpy(np.stack(rows))


def draw(scores_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token a row by inverting the cumulative distribution: int64 [B].

    Args:
        scores_BV: logits.
        uniform_B: random numbers in [0, 1).
        temperature: divides the logits; above 0.
        top_p: only the likeliest tokens count whose probabilities just reach this sum (arXiv 1904.09751); 1 = all.
    """
    probabilities_BV = torch.softmax(scores_BV.float() / temperature, dim=-1)
    order_BV = None
    if top_p < 1:
        probabilities_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= top_p, 0.0)
    cumulative_BV = probabilities_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    target_B1 = (uniform_B[:, None] * total_B1).minimum(total_B1.nextafter(torch.zeros_like(total_B1)))
    place_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)  # the first one beyond: never one of no weight
    return (place_B1 if order_BV is None else order_BV.gather(1, place_B1))[:, 0]


class Draws(LogitsProcessor):
    """Makes transformers' greedy search choose what `draw` draws: every other token's score becomes -inf.

    Args:
        uniforms_BS: a random number for each row and step, on the scores' device.
        prompt: tokens before the first step.
        temperature, top_p: as `draw` takes them.
        on_step: called with the number of each step.
    """

    def __init__(
        self, uniforms_BS: Tensor, prompt: int, temperature: float, top_p: float, on_step: Callable[[int], None]
    ) -> None:
        self._uniforms_BS, self._prompt, self._temperature, self._top_p = uniforms_BS, prompt, temperature, top_p
        self._on_step = on_step

    # The names are those of transformers, which may pass them by name.
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt
        self._on_step(step)
        if scores.isnan().any():  # generate asks the device at every step anyway, whether all have ended
            raise TeacherError(
                "its scores are not numbers: its weights are broken, or overflow in this precision.",
                place="the teacher",
                remedy="Look with `linearize doctor`.",
            )
        token_B = draw(scores, self._uniforms_BS[:, step], self._temperature, self._top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
