"""The course of a transfer stage: layers that stop, go back and slow down; all of it the same after a resume."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from linearize.checkpoint import load_latest, read_trainer
from linearize.data import Corpus, scheduled_rows
from linearize.losses import relative_error
from linearize.metrics import TIMING_FIELDS, MetricsLog, Progress, read_metrics
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.stages import Batch, build_stage
from linearize.stages.base import run_trunk
from linearize.stages.forcing import StudentForcing
from linearize.stages.transfer import Transfer, TransferConfig
from linearize.stages.watch import LayerWatch, WatchConfig
from linearize.surgery import Graft, graft, plan_surgery
from linearize.train import FitSettings, Run, fit

SHORT: dict[str, Any] = {"kind": "transfer", "tokens": 12 * 64, "batch": 4, "micro_batch": 2}


def disturb(stage: Transfer, first: int, before: Callable[[int], None]) -> None:
    """Have `before` called with the number of each micro-batch, counted from `first`, right before it trains."""
    number, plain = itertools.count(first), stage.train_micro_batch

    def train_micro_batch(batch: Batch, backward: Callable[[Any], None]) -> Any:
        before(next(number))
        return plain(batch, backward)

    stage.train_micro_batch = train_micro_batch  # type: ignore[method-assign]


@dataclass
class Trained:
    stage: Transfer
    weights: dict[str, torch.Tensor]
    records: list[dict[str, Any]]
    steps: int


def train(
    make_teacher: Any,
    out: Path,
    values: dict[str, Any],
    *,
    resume: bool = False,
    stop_at: int | None = None,
    spoil: Callable[[Transfer, int], None] = lambda stage, index: None,
) -> Trained:
    """A fresh process as far as it matters; every second step is saved. `stop_at`: the micro-batch it is killed at."""
    teacher = make_teacher()
    torch.manual_seed(7)
    grafted = graft(teacher, plan_surgery(teacher, HedgehogConfig()))
    length = {} if "lengths" in values else {"length": 16}
    stage = build_stage(TransferConfig(**(SHORT | length | values)), grafted)
    assert isinstance(stage, Transfer)
    tokens = np.random.default_rng(0).integers(2, 97, 4000).astype(np.int32)
    corpus = Corpus("text", "0", tokens, np.arange(0, 4000, 50), 1.0, {})

    def before(index: int) -> None:
        if index == stop_at:
            raise KeyboardInterrupt
        spoil(stage, index)

    with MetricsLog(out / "metrics.jsonl") as metrics:
        run = Run(
            out=out,
            stage_index=0,
            student=dict(stage.trainable()),
            checkpoint=load_latest(out) if resume else None,
            metrics=metrics,
            progress=Progress(Console(quiet=True)),
            seed=1,
            recipe_hash="recipe",
            corpus_fingerprint="0",
        )
        disturb(stage, run.checkpoint.state.micro_batches if run.checkpoint else 0, before)
        result = fit(stage, scheduled_rows(corpus, stage.config, 0, 0), run, FitSettings(save_every_steps=2))
    records = [
        {key: value for key, value in record.items() if key not in TIMING_FIELDS}
        for record in read_metrics(out / "metrics.jsonl")
    ]
    weights = {name: parameter.detach().clone() for name, parameter in stage.trainable().items()}
    return Trained(stage, weights, records, result.steps)


def spoil_layer_1(*indices: int) -> Callable[[Transfer, int], None]:
    def spoil(stage: Transfer, index: int) -> None:
        if index in indices:
            for parameter in stage.course.layers[1].values():
                parameter.data.mul_(-4)

    return spoil


WATCH = {"every": 2, "stop": {"improvement": 0.3, "patience": 2}, "retry": {"factor": 1.2, "times": 2}}
COURSES: dict[str, dict[str, Any]] = {
    "watch": {"watch": WATCH, "optimizer": {"lr": 0.01}},
    "forcing": {"student_forcing": {"end": 0.6}, "watch": {"every": 2, "stop": {"improvement": 0.3, "patience": 1}}},
    "lengths": {"lengths": [[0.5, 8], [0.5, 16]]},
}


def forward_by_hand(grafted: Graft, batch: Batch, forced: set[int]) -> Any:
    """Hidden states of the model with student layers in the places `forced`, the teacher's in all others."""
    for layer, student in grafted.students.items():
        student.mode = "student" if layer in forced else "teacher"
    with torch.no_grad():
        hidden = run_trunk(grafted.model, batch)
    for student in grafted.students.values():
        student.mode = "student"
    return hidden


@pytest.mark.parametrize("target", ["drifted", "clean"])
def test_forced_layers_hand_on_what_the_student_makes(make_teacher, packed_batch, target):
    """Layer by layer against models in which the layers below are the student's: inputs, and what they learn from."""
    teacher = make_teacher()
    torch.manual_seed(7)
    grafted = graft(teacher, plan_surgery(teacher, HedgehogConfig()))
    values = {"student_forcing": {"choose": "first", "share": 0.7, "end": 0.5, "target": target}, "length": 16}
    stage = build_stage(TransferConfig(**(SHORT | values)), grafted)
    assert isinstance(stage, Transfer)
    stage.course.before_step(0)
    assert stage.course.draw_forced() == frozenset()
    stage.course.before_step(11)
    assert stage.course.draw_forced() == {0, 1}

    seen: dict[str, dict[int, Any]] = {}
    for name, forced in (("drifted", {0, 1}), ("clean", set[int]())):
        kept = seen[name] = {}
        for student in grafted.students.values():
            student.observer = lambda layer, heads, mixed, kept=kept: kept.update({layer.layer_idx: (heads, mixed)})
        for layer in grafted.students:  # the layers below `layer` as planned, itself and those above the teacher's
            forward_by_hand(grafted, packed_batch, {below for below in forced if below < layer})
            seen[name][layer, "kept"] = kept[layer]
        for student in grafted.students.values():
            student.observer = None
    metrics = stage.train_micro_batch(packed_batch, lambda loss: loss.backward())
    for layer, student in grafted.students.items():
        drifted_heads, goal = seen["drifted"][layer, "kept"][0], seen[target][layer, "kept"][1]
        with torch.no_grad():
            expected = relative_error(student.mix(drifted_heads)[0], goal)
        torch.testing.assert_close(metrics[f"error/layer_{layer:02d}"], expected)


def test_shares_and_choices():
    forcing = StudentForcing(begin=0.2, end=0.6, share=0.5)
    assert [round(forcing.share_at(step, 10), 3) for step in (0, 2, 4, 6, 9)] == [0, 0, 0.25, 0.5, 0.5]
    torch.manual_seed(0)
    counts = [len(forcing.draw(0.5, range(10))) for _ in range(200)]
    assert 4.5 < sum(counts) / 200 < 5.5
    assert forcing.draw(1.0, [3, 5]) == {3, 5}
    whole = StudentForcing(choose="all")
    assert {len(whole.draw(0.5, range(10))) for _ in range(50)} == {0, 10}
    before = torch.get_rng_state()
    assert whole.draw(0.0, range(10)) == frozenset()
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValidationError, match=r"begin 0.6 is not below end 0.5"):
        StudentForcing(begin=0.6)


@pytest.mark.parametrize("name", COURSES)
def test_killed_at_any_step_and_resumed_equals_uninterrupted(make_teacher, tmp_path, name):
    spoil = spoil_layer_1(6)
    whole = train(make_teacher, tmp_path / "whole", COURSES[name], spoil=spoil)
    for killed in (9, 14):
        out = tmp_path / f"killed{killed}"
        with pytest.raises(KeyboardInterrupt):
            train(make_teacher, out, COURSES[name], spoil=spoil, stop_at=killed)
        again = train(make_teacher, out, COURSES[name], spoil=spoil, resume=True)
        assert again.records == whole.records
        assert again.steps == whole.steps
        assert all(torch.equal(again.weights[key], value) for key, value in whole.weights.items())
        course = [read_trainer(load_latest(path))["course"] for path in (out, tmp_path / "whole")]
        assert same(*course)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_watching_without_a_finding_changes_nothing(make_teacher, tmp_path):
    watch = {"every": 2, "stop": {"improvement": 1e-9, "patience": 99}, "retry": {"factor": 1e9}}
    plain = train(make_teacher, tmp_path / "plain", {"optimizer": {"clip": None}})
    watched = train(make_teacher, tmp_path / "watched", {"watch": watch, "optimizer": {"clip": None}})
    assert all(torch.equal(watched.weights[key], value) for key, value in plain.weights.items())


def test_a_layer_that_diverges_goes_back_and_slows_down(make_teacher, tmp_path, caplog):
    watch = {"every": 2, "retry": {"factor": 1.8, "times": 1}}
    found = train(make_teacher, tmp_path, {"watch": watch}, spoil=spoil_layer_1(4, 12))
    scales = [record.get("lr_scale/layer_01") for record in found.records]
    assert scales == [None] * 3 + [0.5] * 4 + [0.25] * 5  # judged at steps 4 and 8
    assert [record["frozen_layers"] for record in found.records] == [0] * 7 + [1] * 5  # it had but one more try
    best = found.stage.course.watch.records[1]
    now = found.stage.course.layers[1].values()
    assert all(torch.equal(good["weight"], parameter) for good, parameter in zip(best.good, now, strict=True))
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "layer 1 diverged" in said[0]
    assert "goes on at 0.5 of its learning rate" in said[0]
    assert said[1].endswith("it goes back and stops")
    others = [name for name in found.records[-1] if name.startswith("error/")]
    assert others == ["error/layer_00", "error/layer_02"]


def test_layers_that_no_longer_improve_are_left_alone_and_the_stage_ends_with_the_last(make_teacher, tmp_path):
    watch = {"every": 1, "stop": {"improvement": 0.99, "patience": 3}}  # nothing improves as much as that
    found = train(make_teacher, tmp_path, {"watch": watch})
    assert found.steps == 4
    assert found.records[-1]["frozen_layers"] == 3
    after = train(make_teacher, tmp_path, {"watch": watch}, resume=True)  # as when the next stage was interrupted
    assert after.steps == 4
    assert all(torch.equal(after.weights[key], value) for key, value in found.weights.items())


def test_checks_while_inputs_change_by_a_schedule():
    config = WatchConfig.model_validate({"every": 1, "stop": {"patience": 1}, "retry": {"factor": 2.0}})
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [parameter], "scale": 1.0}])
    watch = LayerWatch(config, {4: [parameter]})
    watch.after_step(1, {4: 1.0}, optimizer, moving=False)
    for step, error in enumerate((1.5, 2.5, 4.0), 2):  # each less than twice the one before
        watch.after_step(step, {4: error}, optimizer, moving=True)
    assert not watch.frozen
    assert watch.records[4].retries == 0
    watch.after_step(5, {4: 3.99}, optimizer, moving=False)
    assert watch.frozen == {4}


def test_skipped_steps_do_not_count_as_errors():
    """`on_nonfinite: skip` may take the step of a check: the next one is over more steps, not of a larger sum."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [parameter], "scale": 1.0}])
    watch = LayerWatch(WatchConfig.model_validate({"every": 2, "retry": {"factor": 1.2}}), {4: [parameter]})
    for step in (1, 3, 4, 6):
        watch.after_step(step, {4: 1.0}, optimizer, moving=False)
    assert watch.records[4].best == 1
    assert watch.records[4].retries == 0


def test_a_watch_for_nothing_is_refused():
    with pytest.raises(ValidationError, match="watches for nothing"):
        TransferConfig(**(SHORT | {"watch": {"every": 3}}))
