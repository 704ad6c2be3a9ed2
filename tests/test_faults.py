"""Whole conversions that meet a fault: each ends with a sentence, loses nothing, and goes on to the same student."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from linearize import teacher_files
from linearize.checkpoint import STUDENT, TRAINER, list_checkpoints, load_latest
from linearize.errors import NonFiniteLossError, RunError, RunInterrupted
from linearize.job import Conversion
from linearize.metrics import TIMING_FIELDS, read_metrics
from linearize.pipeline import convert
from linearize.run_folder import open_run_folder
from linearize.stages.transfer import Transfer
from linearize.teacher_files import Checkpoint

QUIET = Console(quiet=True)
SETTINGS = (
    *(f"stages.{stage}.{setting}" for stage in (0, 1) for setting in ("length=32", "batch=1", "micro_batch=1")),
    "stages.0.tokens=320",
    "stages.1.tokens=128",
    "heldout_tokens=256",
    "precision=fp32",
)


@pytest.fixture
def job(teacher_folder: Path, text_file: Path, tmp_path: Path) -> Conversion:
    return Conversion(
        str(teacher_folder),
        out=tmp_path / "student",
        data=str(text_file),
        overrides=SETTINGS,
        device="cpu",
        save_every=0.0,  # every step
    )


@pytest.fixture(scope="module")
def undisturbed(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("undisturbed") / "student"
    convert(Conversion(str(teacher_folder), out=out, data=str(text_file), overrides=SETTINGS, device="cpu"), QUIET)
    return losses(out)


def losses(out: str | Path) -> list[dict]:
    records = read_metrics(Path(out) / "run" / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in records]


def at_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Act within the given micro-batch of the transfer stage."""
    plain, calls = Transfer.train_micro_batch, []

    def acting(self, batch, backward):
        calls.append(batch)
        if len(calls) == number:
            act()
        return plain(self, batch, backward)

    monkeypatch.setattr(Transfer, "train_micro_batch", acting)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights that this process lacks")
    yield place
    gc.collect()  # the student that was loaded again is mapped into memory until then
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up(job, small_disk, undisturbed, monkeypatch):
    job = replace(job, out=small_disk / "student")

    def fill() -> None:
        with suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        assert shutil.disk_usage(small_disk).free == 0

    with monkeypatch.context() as patch:
        at_call(patch, 4, fill)
        with pytest.raises((RunError, OSError), match="No space left"):
            convert(job, QUIET)
    latest = load_latest(small_disk / "student" / "run")
    assert latest is not None
    assert latest.state.step >= 2
    (small_disk / "ballast").unlink()
    convert(replace(job, resume=True), QUIET)
    assert losses(job.out) == undisturbed


def test_a_folder_that_may_no_longer_be_written(job, undisturbed, monkeypatch):
    checkpoints = Path(job.out) / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        at_call(patch, 1, lambda: checkpoints.write_text("not a folder"))
        with pytest.raises(RunError, match="could not be written: (Not a directory|File exists).*Make the folder writ"):
            convert(job, QUIET)
    checkpoints.unlink()
    convert(replace(job, resume=True), QUIET)
    assert losses(job.out) == undisturbed


@pytest.mark.parametrize("name", [STUDENT, TRAINER])
@pytest.mark.parametrize("damage", ["truncated", "one bit flipped"])
def test_the_newest_checkpoint_is_damaged(job, undisturbed, monkeypatch, caplog, name, damage):
    with monkeypatch.context() as patch:
        at_call(patch, 6, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(job, QUIET)
    before, newest = list_checkpoints(Path(job.out) / "run")
    content = bytearray((newest / name).read_bytes())
    if damage == "truncated":
        del content[-7:]
    else:
        content[len(content) // 2] ^= 4
    (newest / name).write_bytes(content)
    convert(replace(job, resume=True), QUIET)
    assert f"{newest} cannot be used: {name}" in caplog.text
    assert before.name == "stage0-step000004"
    assert losses(job.out) == undisturbed


def test_the_text_changed_between_two_runs(job, text_file, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_bytes(text_file.read_bytes())
    job = replace(job, data=str(text))
    with monkeypatch.context() as patch:
        at_call(patch, 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(job, QUIET)
    kept = losses(job.out)
    text.write_text(text.read_text().replace("gull", "tern", 1))
    with pytest.raises(RunError, match="this run began with another text"):
        convert(replace(job, resume=True), QUIET)
    assert losses(job.out) == kept


def test_the_teacher_s_weights_changed_between_two_runs(job, teacher_folder, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    job = replace(job, model=str(teacher))
    with monkeypatch.context() as patch:
        at_call(patch, 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(job, QUIET)
    weights = load_file(teacher / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name] * 1.01}, teacher / "model.safetensors", metadata={"format": "pt"})
    with monkeypatch.context() as patch:
        patch.setattr("linearize.pipeline.load_teacher", None)  # it is said before anything is loaded
        with pytest.raises(RunError, match=rf"began with other weights of {teacher}: samples .*; now they are .*Put"):
            convert(replace(job, resume=True), QUIET)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})  # other bytes in its header
    convert(replace(job, resume=True), QUIET)


def test_a_hub_model_got_another_commit_between_two_runs(job, teacher_folder, tmp_path, monkeypatch):
    """The run goes on with the commit that it began with, which the Hub keeps."""
    other, commits = tmp_path / "other", {"a" * 40: teacher_folder}
    shutil.copytree(teacher_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: w * 1.01 for name, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})

    def from_hub(repo: str, revision: str | None) -> Checkpoint:
        commit = revision or list(commits)[-1]
        return Checkpoint(commits[commit], repo, f"{repo}@{commit}", revision=commit, hub=repo)

    monkeypatch.setattr(teacher_files, "_from_hub", from_hub)
    job = replace(job, model="owner/name")
    with monkeypatch.context() as patch:
        at_call(patch, 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(job, QUIET)
    commits["b" * 40] = other
    convert(replace(job, resume=True), QUIET)
    assert f"owner/name@{'a' * 40}" in (Path(job.out) / "run" / "run.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("linearize.pipeline.load_teacher", None)
        patch.setattr(teacher_files, "_from_hub", lambda repo, _: from_hub(repo, None))
        with pytest.raises(RunError, match=r"began with other weights of owner/name: commit a+ .*; now .* commit b+"):
            convert(replace(job, resume=True), QUIET)


def test_two_runs_on_one_folder(job):
    with (
        open_run_folder(job.out, resume=False, overwrite=False),
        pytest.raises(RunError, match="another process is running in this folder"),
    ):
        convert(job, QUIET)


def test_killed_before_the_run_s_facts_were_written(job, undisturbed, tmp_path):
    run = tmp_path / "student" / "run"
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / ".run.json.tmp").write_text('{"model"')
    convert(job, QUIET)
    assert losses(job.out) == undisturbed


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_batch_without_a_finite_loss(job, monkeypatch, choice):
    plain, calls = Transfer.train_micro_batch, []

    def poisoned(self, batch, backward):
        calls.append(batch)
        return plain(self, batch, (lambda loss: backward(loss * float("nan"))) if len(calls) == 3 else backward)

    monkeypatch.setattr(Transfer, "train_micro_batch", poisoned)
    job = replace(job, overrides=(*SETTINGS, f"stages.0.on_nonfinite={choice}"))
    if choice == "stop":
        with pytest.raises(NonFiniteLossError, match=r"step 3 of 10: micro-batches 2 to 2: gradient norm nan"):
            convert(job, QUIET)
        return
    convert(job, QUIET)
    skipped = [record["step"] for record in losses(job.out) if "skipped" in record]
    assert skipped == [3]
    assert all(record["loss"] is not None for record in losses(job.out))


def test_sigterm_saves(job, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(RunInterrupted, match="stopped by SIGTERM after step 5 of 10"):
            convert(replace(job, save_every=1e6), QUIET)
    assert [path.name for path in list_checkpoints(Path(job.out) / "run")] == ["stage0-step000005"]
    convert(replace(job, resume=True), QUIET)
    assert losses(job.out) == undisturbed
