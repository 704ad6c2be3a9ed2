"""A toy model and stage for tests of the training loop."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from linearize.checkpoint import load_latest
from linearize.metrics import TIMING_FIELDS, MetricsLog, Progress, read_metrics
from linearize.stages.base import Batch, OptimizerConfig, StageConfig
from linearize.stages.course import SteadyCourse
from linearize.train import FitSettings, Run, fit

VOCAB, WIDTH, LENGTH = 17, 8, 6


def toy_batches(count, rows):
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids_BT = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
        position_ids_BT = torch.arange(LENGTH).expand(rows, -1)
        batches.append(Batch(ids_BT, position_ids_BT, None, torch.ones_like(ids_BT, dtype=torch.bool)))
    return batches


def latest(out):
    found = load_latest(out)
    assert found is not None
    return found


class ToyModel(nn.Module):
    def __init__(self, dropout=0.3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding: torch.Tensor
        self.register_buffer("embedding", torch.randn(VOCAB, WIDTH, generator=generator))
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.idle = nn.Linear(2, 2)  # a part of the student that this stage does not train
        self.dropout = dropout
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.requires_grad_(False)

    def forward(self, ids_BT):
        hidden = nn.functional.dropout(torch.tanh(self.first(self.embedding[ids_BT])), self.dropout)
        return self.second(hidden)


@dataclass
class ToyStage:
    """Predicts the token itself; two losses, each with its own backward, and numpy and python noise in one metric."""

    model: ToyModel
    config: StageConfig
    before: Callable[[int], None] = lambda index: None
    name: str = "toy"
    calls: int = 0
    course = SteadyCourse()

    def trainable(self):
        return {name: p for name, p in self.model.named_parameters() if not name.startswith("idle")}

    def train_micro_batch(self, batch, backward):
        self.before(self.calls)
        self.calls += 1
        logits_BTV = self.model(batch.input_ids_BT)
        ce = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.input_ids_BT.flatten())
        backward(ce)
        penalty = 0.01 * self.model.first.weight.square().mean()
        backward(penalty)
        return {"loss": (ce + penalty).detach(), "penalty": penalty.detach(), "noise": torch.tensor(random.random())}


def stage_config(steps=10, batch=4, micro_batch=2, **optimizer):
    settings = OptimizerConfig(**({"lr": 1e-2} | optimizer))
    return StageConfig(
        kind="toy",
        tokens=steps * batch * LENGTH,
        length=LENGTH,
        batch=batch,
        micro_batch=micro_batch,
        optimizer=settings,
    )


def make_run(out, model, resume=False, stage_index=0):
    checkpoint = load_latest(out) if resume else None
    return Run(
        out=out,
        stage_index=stage_index,
        student=dict(model.named_parameters()),
        checkpoint=checkpoint,
        metrics=MetricsLog(out / "metrics.jsonl"),
        progress=Progress(Console(quiet=True)),
        seed=11,
        recipe_hash="recipe",
        corpus_fingerprint="corpus",
    )


def train_toy(out, config=None, resume=False, before=lambda index: None, settings=None, dropout=0.3, device="cpu"):
    """A fresh process as far as it matters: new model, new random state, new files."""
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    random.seed()
    config = config or stage_config()
    model = ToyModel(dropout).to(device)
    stage = ToyStage(model, config, before)
    run = make_run(out, model, resume)
    batches = toy_batches(config.steps * config.accumulation, min(config.batch, config.micro_batch))
    try:
        return fit(stage, batches, run, settings or FitSettings()), model
    finally:
        run.metrics.close()


def without_timing(path):
    return [{key: value for key, value in record.items() if key not in TIMING_FIELDS} for record in read_metrics(path)]


def assert_same_weights(one, two):
    for (name, was), now in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(was, now), name


def stop_at(call, number=signal.SIGTERM):
    def before(index):
        if index == call:
            os.kill(os.getpid(), number)

    return before
