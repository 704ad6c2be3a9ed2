"""Student-forced inputs: a layer in transfer learns on what the student layers below it make of the text.

In plain transfer every layer sees its teacher layer's own input. When the student runs, it sees the answers of student
layers below it instead, which it never saw in training: errors drift. Here the answers of some student layers go on to
the layers above, more of them as the stage goes on (as scheduled sampling does with tokens, arXiv 1506.03099; with the
expert asked on the learner's own states, arXiv 1011.0686). Its use for linearisation is ours and unverified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator

from linearize.config import Config, Number

Choice = Literal["each", "first", "all"]
Target = Literal["drifted", "clean"]


def _each(share: float, layers: Sequence[int]) -> list[int]:
    """Every layer by itself: inputs of all degrees of drift."""
    return [layer for layer, draw in zip(layers, torch.rand(len(layers)).tolist(), strict=True) if draw < share]


def _first(share: float, layers: Sequence[int]) -> list[int]:
    """The lowest ones: drift begins at the bottom, where errors are smallest."""
    return list(layers[: round(share * len(layers))])


def _all(share: float, layers: Sequence[int]) -> list[int]:
    """All or none: inputs are the teacher's or the student's, never a mixture."""
    return list(layers) if torch.rand(()).item() < share else []


CHOICES: dict[Choice, Callable[[float, Sequence[int]], list[int]]] = {"each": _each, "first": _first, "all": _all}


class StudentForcing(Config):
    """How the share of student-forced layers rises, and what they learn from.

    Target `drifted` is what the teacher layer makes of the very input that the student layer sees: always within its
    reach, and free of charge. `clean` is what the teacher layer makes of the teacher's own input: the student layer is
    asked to undo the drift below it, which its mixer may not be able to, at the price of a second forward of the
    teacher and of keeping the heads of all layers.
    """

    share: Number = Field(1.0, gt=0, le=1, description="of the layers, at the end of the rise")
    begin: Number = Field(0.0, ge=0, lt=1, description="share of the steps without any")
    end: Number = Field(0.5, gt=0, le=1, description="share of the steps after which `share` is reached")
    choose: Choice = Field("each", description="which layers' answers go on: each by chance, the first, all or none")
    target: Target = Field("drifted", description="the teacher layer's answer to the drifted or to the clean input")

    @model_validator(mode="after")
    def _rises(self) -> "StudentForcing":
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin:g} is not below end {self.end:g}")
        return self

    def share_at(self, step: int, steps: int) -> float:
        """The share in step number `step`, from 0, of `steps`."""
        risen = (step / steps - self.begin) / (self.end - self.begin)
        return self.share * min(1.0, max(0.0, risen))

    def draw(self, share: float, layers: Sequence[int]) -> frozenset[int]:
        """The layers of a micro-batch whose student answers go on. Draws from torch's generator, unless share is 0."""
        return frozenset(CHOICES[self.choose](share, layers)) if share else frozenset()
