"""Trackers repeat metrics.jsonl, go on with the same run, stay offline and never see a credential."""

from __future__ import annotations

import os
import signal
import sqlite3
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from linearize.errors import RunError, RunInterrupted
from linearize.job import Conversion
from linearize.metrics import read_metrics
from linearize.pipeline import convert
from linearize.recipe import load_recipe
from linearize.stages.distil import Distil
from linearize.trackers import TRACKERS, TrackedRun, check_trackers, tracking

QUIET = Console(quiet=True)
SECRET = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = (
    *(f"stages.{stage}.{setting}" for stage in (0, 1) for setting in ("length=32", "batch=1", "micro_batch=1")),
    "stages.0.tokens=128",
    "stages.1.tokens=128",
    "heldout_tokens=128",
    "precision=fp32",
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLE_CODE", "WANDB_DISABLE_GIT"):
        monkeypatch.setenv(name, "")  # so that what the run sets does not outlive the test
        monkeypatch.delenv(name)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def stopped_and_resumed(job: Conversion) -> list[dict]:
    """A run that is stopped in its second stage and goes on; its records."""
    with pytest.MonkeyPatch.context() as patch:
        train, calls = Distil.train_micro_batch, []

        def acting(self, batch, backward):
            calls.append(batch)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return train(self, batch, backward)

        patch.setattr(Distil, "train_micro_batch", acting)
        with pytest.raises(RunInterrupted):
            convert(job, QUIET)
    convert(replace(job, resume=True), QUIET)
    return read_metrics(Path(job.out) / "run" / "metrics.jsonl")


@pytest.fixture
def job(teacher_folder: Path, text_file: Path, tmp_path: Path) -> Conversion:
    return Conversion(
        str(teacher_folder), out=tmp_path / "student", data=str(text_file), overrides=SETTINGS, device="cpu"
    )


def assert_no_secret(folder: Path) -> None:
    assert [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []


def need(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_what_the_file_holds(job, tmp_path):
    need("tensorboard")
    records = stopped_and_resumed(replace(job, track=("tensorboard",)))
    found = read_tensorboard(tmp_path / "student" / "run" / "tensorboard")
    for stage, name, first in ((0, "transfer", 0), (1, "distil", 4)):
        for key in ("loss", "grad_norm", "lr", "tokens_per_second"):
            values = [(first + record["step"], record[key]) for record in records if record["stage"] == stage]
            assert [step for step, _ in found[f"{stage}_{name}/{key}"]] == [step for step, _ in values]
            assert [value for _, value in found[f"{stage}_{name}/{key}"]] == pytest.approx([v for _, v in values])
    assert_no_secret(tmp_path)


def test_steps_that_are_taken_again_replace_those_that_were_lost(tmp_path):
    need("tensorboard")
    stages = load_recipe("hedgehog", ["stages.0.tokens=131072", "stages.1.tokens=131072"]).stages
    run = TrackedRun("student", "id", tmp_path, stages)
    for done, value, last in ((0, 1.0, 9), (4, 2.0, 12)):
        with tracking(["tensorboard"], replace(run, done=done), {"seed": 0}) as log:
            for step in range(done + 1, last + 1):
                log({"stage": 0, "name": "transfer", "step": step, "loss": value, "error": None})
    found = read_tensorboard(tmp_path / "tensorboard")
    assert found["0_transfer/loss"] == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 13)]
    assert "0_transfer/error" not in found
    assert run.step(1, 3) == 16 + 3


def test_wandb_stays_offline_and_goes_on_with_its_run(job, tmp_path, monkeypatch):
    need("wandb")
    monkeypatch.setattr("sys.argv", ["linearize", f"--token={SECRET}"])
    stopped_and_resumed(replace(job, track=("wandb",)))
    runs = sorted(path.name for path in (tmp_path / "student" / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({name.rpartition("-")[2] for name in runs}) == 1
    assert_no_secret(tmp_path)


def test_trackio_stays_here_and_goes_on_with_its_run(job, tmp_path):
    need("trackio")
    records = stopped_and_resumed(replace(job, track=("trackio",)))
    (file,) = (tmp_path / "trackio").glob("linearize*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select distinct run_name from metrics").fetchall()
        steps = [step for (step,) in database.execute("select step from metrics order by step")]
    assert len(rows) == 1
    assert steps == list(range(1, len(records) + 1))
    assert_no_secret(tmp_path)


def test_the_user_s_own_mode_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    TRACKERS["wandb"].build(TrackedRun("student", "id", tmp_path, ()))
    assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["WANDB_DISABLE_GIT"] == "true"


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    with pytest.raises(RunError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("linearize.trackers.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"'wandb' is not installed. Install it: pip install 'linearize\[track\]'"):
        check_trackers(["wandb"])
