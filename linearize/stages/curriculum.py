"""The course of a transfer stage: which layers still train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from linearize.stages.course import Parameters
from linearize.stages.watch import LayerWatch, WatchConfig
from linearize.surgery import Graft


def error_name(layer: int) -> str:
    """The metric of a layer's error."""
    return f"error/layer_{layer:02d}"


class TransferCourse:
    """What a transfer stage's options say of its course.

    Args:
        watch: of the layers, if any.
        layers: the trained parameters of every student layer, by its number.
    """

    def __init__(self, watch: WatchConfig | None, layers: Mapping[int, Parameters]) -> None:
        self.layers = layers
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

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, step: int, metrics: Mapping[str, float], optimizer: Optimizer) -> dict[str, float]:
        if self.watch is None:
            return {}
        errors = {layer: metrics[error_name(layer)] for layer in self.layers if layer not in self.frozen}
        self.watch.after_step(step, errors, optimizer, moving=False)
        slow = {i: record.scale for i, record in self.watch.records.items() if record.scale < 1}
        return {"frozen_layers": len(self.frozen), **{f"lr_scale/layer_{i:02d}": scale for i, scale in slow.items()}}

    def state(self) -> dict[str, Any]:
        return {} if self.watch is None else {"watch": self.watch.state()}

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer) -> None:
        if self.watch is not None:
            self.watch.restore(state["watch"], optimizer)


def parameters_by_layer(graft: Graft, trained: Mapping[str, nn.Parameter]) -> dict[int, Parameters]:
    """The trained parameters of every student layer; together they are all."""
    found: dict[int, Parameters] = {}
    for layer, student in graft.students.items():
        own = {id(parameter) for parameter in student.parameters()}
        found[layer] = {name: parameter for name, parameter in trained.items() if id(parameter) in own}
    assert sum(map(len, found.values())) == len(trained)
    return found
