"""The course of a transfer stage: which layers still train, and which see what student layers below them made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from linearize.stages.course import Parameters
from linearize.stages.forcing import StudentForcing
from linearize.stages.watch import LayerWatch, WatchConfig
from linearize.surgery import Graft


def error_name(layer: int) -> str:
    """The metric of a layer's error."""
    return f"error/layer_{layer:02d}"


class CourseOptions(Protocol):
    """What the course reads of the stage's configuration."""

    @property
    def student_forcing(self) -> StudentForcing | None: ...
    @property
    def watch(self) -> WatchConfig | None: ...
    @property
    def steps(self) -> int: ...


class TransferCourse:
    """What a transfer stage's options say of its course.

    Args:
        config: student forcing and watch, if any, and the number of steps.
        layers: the trained parameters of every student layer, by its number.

    Attributes:
        share: of the layers whose student answers go on, in the present step.
    """

    def __init__(self, config: CourseOptions, layers: Mapping[int, Parameters]) -> None:
        self.config, self.layers, watch = config, layers, config.watch
        self.share = 0.0
        self.watch = None if watch is None else LayerWatch(watch, {i: list(own.values()) for i, own in layers.items()})

    @property
    def frozen(self) -> frozenset[int]:
        """The layers that train no more."""
        return frozenset() if self.watch is None else self.watch.frozen

    @property
    def finished(self) -> bool:
        return self.frozen == self.layers.keys()

    def groups(self, parameters: Parameters) -> list[Parameters]:
        """One a layer where layers may slow down: a group more is a launch more of the optimiser."""
        apart = self.watch is not None and self.watch.config.retry is not None
        return list(self.layers.values()) if apart else [parameters]

    def draw_forced(self) -> frozenset[int]:
        """The layers of one micro-batch whose student answers go on to the layers above."""
        forcing = self.config.student_forcing
        return frozenset() if forcing is None else forcing.draw(self.share, list(self.layers))

    def before_step(self, step: int) -> None:
        self.share = self._share_at(step)

    def after_step(self, step: int, metrics: Mapping[str, float], optimizer: Optimizer) -> dict[str, float]:
        forced = {} if self.config.student_forcing is None else {"student_forced": self.share}
        if self.watch is None:
            return forced
        errors = {layer: metrics[error_name(layer)] for layer in self.layers if layer not in self.frozen}
        moving = self.share != self._share_at(max(0, step - self.watch.config.every))
        self.watch.after_step(step, errors, optimizer, moving=moving)
        slow = {i: record.scale for i, record in self.watch.records.items() if record.scale < 1}
        scales = {f"lr_scale/layer_{layer:02d}": scale for layer, scale in slow.items()}
        return {**forced, "frozen_layers": len(self.frozen), **scales}

    def state(self) -> dict[str, Any]:
        return {} if self.watch is None else {"watch": self.watch.state()}

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer) -> None:
        if self.watch is not None:
            self.watch.restore(state["watch"], optimizer)

    def _share_at(self, step: int) -> float:
        forcing = self.config.student_forcing
        return 0.0 if forcing is None else forcing.share_at(step, self.config.steps)


def parameters_by_layer(graft: Graft, trained: Mapping[str, nn.Parameter]) -> dict[int, Parameters]:
    """The trained parameters of every student layer; together they are all."""
    found: dict[int, Parameters] = {}
    for layer, student in graft.students.items():
        own = {id(parameter) for parameter in student.parameters()}
        found[layer] = {name: parameter for name, parameter in trained.items() if id(parameter) in own}
    assert sum(map(len, found.values())) == len(trained)
    return found
