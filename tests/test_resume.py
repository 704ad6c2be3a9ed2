"""A conversion that was interrupted, killed or finished goes on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch
from rich.console import Console

from linearize.errors import NonFiniteLossError, RunError, RunInterrupted
from linearize.export import load_student
from linearize.pipeline import convert
from linearize.stages.distil import Distil
from linearize.stages.transfer import Transfer
from tests.short_runs import BASE, losses


@pytest.mark.parametrize(
    "overrides", [(), BASE, (*BASE, "precision=bf16")], ids=["adapters", "base weights", "base weights from bf16"]
)
def test_interrupted_at_three_random_steps_and_resumed_is_the_same_run(short_job, monkeypatch, overrides):
    whole = convert(short_job("whole", *overrides), Console(quiet=True))
    stop_at = sorted(random.Random(7).sample(range(2, 38), 3))
    seen = {"calls": 0}

    def stopping(original):
        def train_micro_batch(self, batch, backward):
            seen["calls"] += 1
            if stop_at and seen["calls"] == stop_at[0]:
                stop_at.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch, backward)

        return train_micro_batch

    for stage in (Transfer, Distil):
        monkeypatch.setattr(stage, "train_micro_batch", stopping(stage.train_micro_batch))
    interruptions = 0
    while True:
        try:
            broken = convert(short_job("broken", *overrides, resume=interruptions > 0), Console(quiet=True))
            break
        except RunInterrupted as stopped:
            assert "--resume" in str(stopped)
            interruptions += 1
    assert interruptions == 3
    assert losses(broken.folder) == losses(whole.folder)
    assert broken.student == whole.student
    left, right = load_student(whole.folder).state_dict(), load_student(broken.folder).state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("overrides", [(), BASE], ids=["adapters", "base weights"])
def test_killed_as_a_stage_begins_and_resumed_is_the_same_run(short_job, monkeypatch, overrides):
    """The last checkpoint is then of the end of the stage before."""
    whole = convert(short_job("whole", *overrides), Console(quiet=True))

    def killed(self, batch, backward):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Distil, "train_micro_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(short_job("killed", *overrides), Console(quiet=True))
    resumed = convert(short_job("killed", *overrides, resume=True), Console(quiet=True))
    assert losses(resumed.folder) == losses(whole.folder)
    assert resumed.student == whole.student


def test_non_finite_loss_stops_and_keeps_the_last_good_state(short_job, monkeypatch):
    plain = Transfer.train_micro_batch
    calls = {"count": 0}

    def poisoned(self, batch, backward):
        calls["count"] += 1
        return plain(self, batch, (lambda loss: backward(loss * float("nan"))) if calls["count"] == 7 else backward)

    monkeypatch.setattr(Transfer, "train_micro_batch", poisoned)
    with pytest.raises(NonFiniteLossError, match="step"):
        convert(short_job("nan"), Console(quiet=True))
    monkeypatch.setattr(Transfer, "train_micro_batch", plain)
    resumed = convert(short_job("nan", resume=True), Console(quiet=True))
    whole = convert(short_job("whole"), Console(quiet=True))
    assert losses(resumed.folder) == losses(whole.folder)


@pytest.mark.parametrize("overrides", [(), (*BASE, "precision=bf16")], ids=["adapters", "base weights"])
def test_resume_of_a_finished_run_writes_the_same_student(short_job, overrides):
    first = convert(short_job("first", *overrides), Console(quiet=True))
    again = convert(short_job("first", *overrides, resume=True), Console(quiet=True))
    assert again.student == first.student


def test_resume_refuses_another_recipe(short_job):
    convert(short_job("first"), Console(quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linearize.pipeline.load_teacher", None)  # it is said before anything is loaded
        with pytest.raises(RunError, match=r"another recipe \(stages.0.optimizer.lr was [0-9.]+, is 0.5\)"):
            convert(short_job("first", "stages.0.optimizer.lr=0.5", resume=True), Console(quiet=True))
