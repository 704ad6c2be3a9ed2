"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from linearize.stages.base import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step number `step` (from 0) of `steps`.

    The first `warmup` share of the steps climbs in equal parts from lr / (n + 1) and reaches the peak at step n; the
    schedule then goes from the peak to exactly `min_lr_ratio` × the peak at the last step.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * SCHEDULES[config.schedule](step - warmup, steps - warmup, steps, config)


def _cosine(step: int, after_warmup: int, steps: int, config: OptimizerConfig) -> float:
    share = step / max(1, after_warmup - 1)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def _constant(step: int, after_warmup: int, steps: int, config: OptimizerConfig) -> float:
    return 1.0


def _wsd(step: int, after_warmup: int, steps: int, config: OptimizerConfig) -> float:
    """Warm-up, stable, decay: at the peak, then linearly down over the last `decay` share of all steps."""
    decay = min(round(config.decay * steps), after_warmup)
    into_decay = step - (after_warmup - decay) + 1
    return 1.0 if into_decay <= 0 else 1 - (1 - config.min_lr_ratio) * into_decay / decay


# (step after the warm-up, steps after the warm-up, steps, config) -> share of the peak
SCHEDULES: dict[str, Callable[[int, int, int, OptimizerConfig], float]] = {
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}
