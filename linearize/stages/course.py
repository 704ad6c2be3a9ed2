"""What a stage changes about itself while its steps go by. Most stages change nothing: `SteadyCourse`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

Parameters = dict[str, nn.Parameter]


class Course(Protocol):
    """Steered by `train.fit`, around each optimiser step; its state is part of every checkpoint."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train, so that the stage ends before its last step."""
        ...

    def groups(self, parameters: Parameters) -> list[Parameters]:
        """The trained parameters, by what may get a learning rate of its own (`scale` of its optimiser group)."""
        ...

    def before_step(self, step: int) -> None:
        """Step number `step`, from 0, is about to be computed."""
        ...

    def after_step(self, step: int, metrics: Mapping[str, float], optimizer: Optimizer) -> dict[str, float]:
        """`step` steps are taken, the last one with these means over its micro-batches; more to log with them."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `restore` takes; tensors in it are never written to again."""
        ...

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer) -> None:
        """Go on from a checkpoint, whose weights and moments are back already."""
        ...


class SteadyCourse:
    """Every step like the one before it."""

    finished = False

    def groups(self, parameters: Parameters) -> list[Parameters]:
        return [parameters]

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, step: int, metrics: Mapping[str, float], optimizer: Optimizer) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer) -> None:
        pass
