"""Watches the layers of a transfer stage: those that no longer improve stop, those that diverge go back and slow down.

Both judge the mean training error of a layer over `every` steps: it costs nothing, and it is part of the run, so that a
resumed run judges alike. Both are ours; no paper describes them for linearisation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from linearize.config import Config, Number

log = logging.getLogger(__name__)


class StopConfig(Config):
    """A layer stops training when its error did not fall by `improvement`, a share of it, in `patience` checks."""

    improvement: Number = Field(0.01, gt=0, lt=1)
    patience: int = Field(4, ge=1)


class RetryConfig(Config):
    """A layer whose error rises above `factor` × its best goes back to where it was best, at half its learning rate.

    At most `times`; the next time it goes back and stops training. A copy of its weights and moments is kept.
    """

    factor: Number = Field(2.0, gt=1)
    times: int = Field(3, ge=1)


class WatchConfig(Config):
    """Checks of every layer's mean training error over `every` steps."""

    every: int = Field(50, ge=1, description="steps between checks")
    stop: StopConfig | None = Field(None, description="{improvement, patience}: layers that no longer improve stop")
    retry: RetryConfig | None = Field(None, description="{factor, times}: layers that diverge go back and slow down")

    @model_validator(mode="after")
    def _some_use(self) -> "WatchConfig":
        if self.stop is None and self.retry is None:
            raise ValueError("watches for nothing; give it stop: {}, retry: {} or both, or leave watch out")
        return self


@dataclass
class LayerRecord:
    """What is known of one layer; goes to checkpoints as it is.

    Attributes:
        total, noted: sum of its errors since the last check, and of how many steps: skipped ones have none.
        best: lowest mean error of a check.
        mark: the error that the next improvement is measured from; `stale` checks were no improvement on it.
        scale: of its learning rate.
        good: weights and moments at its best check, by parameter; empty where layers do not go back.
    """

    total: float = 0.0
    noted: int = 0
    best: float = math.inf
    mark: float = math.inf
    stale: int = 0
    retries: int = 0
    scale: float = 1.0
    frozen: bool = False
    good: list[dict[str, Tensor]] = field(default_factory=list)


class LayerWatch:
    """Judges layers by their errors.

    Args:
        config: when to judge, and what follows.
        layers: the trained parameters of every layer, by its number.
    """

    def __init__(self, config: WatchConfig, layers: Mapping[int, list[nn.Parameter]]) -> None:
        self.config, self.layers = config, layers
        self.records = {layer: LayerRecord() for layer in layers}

    @property
    def frozen(self) -> frozenset[int]:
        """The layers that train no more."""
        return frozenset(layer for layer, record in self.records.items() if record.frozen)

    def after_step(self, step: int, errors: Mapping[int, float], optimizer: Optimizer, *, moving: bool) -> None:
        """Note the errors of the layers that trained in this step; every `every` steps, judge them.

        `moving`: the inputs of the layers change by a schedule, and errors with them: a check is then compared with the
        one before it, and no layer stops.
        """
        for layer, error in errors.items():
            self.records[layer].total += error
            self.records[layer].noted += 1
        if step % self.config.every:
            return
        for layer in errors:
            record = self.records[layer]
            error, record.total, record.noted = record.total / record.noted, 0.0, 0
            if self.config.retry is not None and error > self.config.retry.factor * record.best:
                self._go_back(layer, error, optimizer)
            else:
                self._go_on(layer, error, optimizer, moving)

    def state(self) -> dict[int, dict[str, Any]]:
        # not asdict() of the whole: it would copy every tensor, and they are not written to again
        return {layer: {**asdict(_bare(record)), "good": record.good} for layer, record in self.records.items()}

    def restore(self, state: Mapping[int, Mapping[str, Any]], optimizer: Optimizer) -> None:
        assert state.keys() == self.records.keys()
        self.records = {layer: LayerRecord(**values) for layer, values in state.items()}
        for layer in self.layers:
            self._set_scale(layer, optimizer)

    def _go_on(self, layer: int, error: float, optimizer: Optimizer, moving: bool) -> None:
        record = self.records[layer]
        if moving or error < record.best:
            record.best = error
            if self.config.retry is not None:
                record.good = [_copy(parameter, optimizer) for parameter in self.layers[layer]]
        stop = self.config.stop
        if stop is None:
            return
        if moving or error <= record.mark * (1 - stop.improvement):
            record.mark, record.stale = error, 0
            return
        record.stale += 1
        if record.stale >= stop.patience:
            record.frozen = True
            log.info("layer %d stops: its error stays at %.4g (was %.4g)", layer, error, record.mark)

    def _go_back(self, layer: int, error: float, optimizer: Optimizer) -> None:
        assert self.config.retry is not None
        record = self.records[layer]
        for parameter, good in zip(self.layers[layer], record.good, strict=True):
            _put_back(parameter, good, optimizer)
        record.retries += 1
        record.frozen = record.retries > self.config.retry.times
        record.scale /= 2
        self._set_scale(layer, optimizer)
        then = "stops" if record.frozen else f"goes on at {record.scale:g} of its learning rate"
        log.warning("layer %d diverged: error %.4g, best %.4g; it goes back and %s", layer, error, record.best, then)

    def _set_scale(self, layer: int, optimizer: Optimizer) -> None:
        if self.config.retry is None:
            return  # all layers are one group then
        ours = {id(parameter) for parameter in self.layers[layer]}
        (group,) = [group for group in optimizer.param_groups if {id(p) for p in group["params"]} == ours]
        group["scale"] = self.records[layer].scale


def _bare(record: LayerRecord) -> LayerRecord:
    return LayerRecord(**{**vars(record), "good": []})


WEIGHT = "weight"
"""The key of the weights themselves beside AdamW's own (`exp_avg`, `exp_avg_sq`, `step`)."""


def _copy(parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Tensor]:
    moments = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    return {WEIGHT: parameter.detach().clone(), **moments}


@torch.no_grad()
def _put_back(parameter: nn.Parameter, good: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    parameter.copy_(good[WEIGHT])
    for name, value in optimizer.state[parameter].items():
        value.copy_(good[name])
