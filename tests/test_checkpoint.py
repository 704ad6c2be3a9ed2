"""Checkpoints are whole or absent, and a broken one never hides the good one before it."""

import errno
import json
import logging
import os
import random

import numpy as np
import pytest
import torch

from linearize import checkpoint as ckpt
from linearize.checkpoint import (
    RunState,
    TrainerState,
    check_same_run,
    list_checkpoints,
    load_latest,
    read_trainer,
    remove_stale,
    restore_student,
    save_checkpoint,
)
from linearize.errors import RunError
from linearize.randomness import get_rng_state, seed_all, set_rng_state


def run_state(step=1, stage_index=0):
    return RunState(
        stage_index=stage_index,
        stage_name="toy",
        step=step,
        steps=10,
        seed=0,
        recipe_hash="r",
        corpus_fingerprint="c",
        device="cpu",
    )


def trainer_state() -> TrainerState:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {"names": ["weight"], "optimizer": optimizer.state_dict(), "rng": get_rng_state(), "course": {}}


def save(out, step, stage_index=0, keep=2, value=None):
    student = {"weight": torch.full((3,), float(step if value is None else value)), "bias": torch.zeros(2).bfloat16()}
    return save_checkpoint(out, run_state(step, stage_index), student, trainer_state(), keep)


def latest(out):
    found = load_latest(out)
    assert found is not None
    return found


def names(out):
    return [path.name for path in list_checkpoints(out)]


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


@pytest.mark.parametrize("gaussians_pending", [False, True])
def test_rng_state_repeats_after_a_weights_only_load(tmp_path, gaussians_pending):
    if gaussians_pending:  # both generators keep the second number of a pair
        random.gauss(0, 1), np.random.randn()
    torch.save(get_rng_state(), tmp_path / "rng.pt")
    expected = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


def test_get_rng_state_is_a_copy():
    seed_all(1, 0)
    state = get_rng_state()
    expected = draw()
    np.random.rand(2000)
    set_rng_state(state)
    assert draw() == expected


def test_seeds_differ_between_stages_and_runs():
    drawn = []
    for seed, stage in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        seed_all(seed, stage)
        drawn.append(draw())
    assert drawn[0] == drawn[3]
    assert len({str(numbers) for numbers in drawn}) == 3


def test_round_trip(tmp_path):
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "stage0-step000007"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["student.safetensors", "trainer.pt", "state.json", "manifest.json"]
    )
    found = latest(tmp_path)
    assert found.folder == folder
    assert found.state.step == 7
    assert not found.state.finished
    assert set(found.state.versions) >= {"python", "torch", "transformers", "linearize"}

    student = {"weight": torch.zeros(3), "bias": torch.ones(2).bfloat16()}
    where = student["weight"].data_ptr()
    restore_student(found, student)
    assert student["weight"].tolist() == [7.0] * 3
    assert student["weight"].data_ptr() == where
    trainer = read_trainer(found)
    assert trainer["names"] == ["weight"]
    assert trainer["optimizer"]["state"][0]["step"] == 1


def test_nothing_saved_is_none(tmp_path):
    assert load_latest(tmp_path) is None


def test_keeps_the_last_ones_in_the_order_of_the_run(tmp_path):
    for stage_index, step in [(0, 999_999), (0, 1_000_000), (1, 2)]:  # in the order of names, 1000000 < 999999
        save(tmp_path, step, stage_index)
    assert names(tmp_path) == ["stage0-step1000000", "stage1-step000002"]


def test_a_broken_newer_one_does_not_push_out_the_good_ones(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoints/stage0-step000020/trainer.pt").unlink()
    assert latest(tmp_path).state.step == 10
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["stage0-step000015"]
    assert latest(tmp_path).state.step == 15


def test_saving_over_a_broken_one_of_the_same_step(tmp_path):
    folder = save(tmp_path, 5)
    (folder / "manifest.json").unlink()
    save(tmp_path, 5, value=1.5)
    student = {"weight": torch.zeros(3), "bias": torch.zeros(2).bfloat16()}
    restore_student(latest(tmp_path), student)
    assert student["weight"].tolist() == [1.5] * 3
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def truncate(folder, name):
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flip_bit(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)


def remove(folder, name):
    (folder / name).unlink()


def empty(folder, name):
    (folder / name).write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_bit, remove, empty])
@pytest.mark.parametrize("name", ["student.safetensors", "trainer.pt", "state.json", "manifest.json"])
def test_a_broken_one_is_reported_and_the_one_before_is_used(tmp_path, caplog, damage, name):
    save(tmp_path, 1)
    damage(save(tmp_path, 2), name)
    with caplog.at_level(logging.WARNING):
        found = latest(tmp_path)
    assert found.state.step == 1
    [record] = caplog.records
    assert "stage0-step000002" in record.getMessage()
    assert damage is flip_bit or name in record.getMessage()  # a flip may turn a name in the manifest into another


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"student.safetensors": 3}'])
def test_a_manifest_that_is_json_but_no_manifest(tmp_path, content):
    (save(tmp_path, 1) / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=r"manifest\.json does not list"):
        latest(tmp_path)


def test_a_manifest_without_fingerprints(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(dict.fromkeys(manifest)))
    with pytest.raises(RunError, match="all 1 checkpoints are broken"):
        latest(tmp_path)


def test_all_broken_is_an_error_that_names_each(tmp_path):
    for step in (1, 2):
        truncate(save(tmp_path, step), "student.safetensors")
    with pytest.raises(RunError, match=r"all 2 .*step000002: student.* bytes instead of .*step000001"):
        latest(tmp_path)


def test_a_state_of_another_version_counts_as_broken(tmp_path):
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = ckpt._fingerprint(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="another version"):
        latest(tmp_path)


@pytest.mark.parametrize("place", ["_write_json", "_flush", "_publish"])
def test_killed_while_saving_leaves_the_earlier_one(tmp_path, monkeypatch, place):
    save(tmp_path, 1)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, place, die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["stage0-step000001"]
    assert latest(tmp_path).state.step == 1


def test_a_half_written_folder_is_ignored_and_removed(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "checkpoints" / ".tmp-stage0-step000002-4711"
    stale.mkdir()
    (stale / "student.safetensors").write_bytes(b"half")
    assert latest(tmp_path).state.step == 1
    remove_stale(tmp_path)
    assert names(tmp_path) == ["stage0-step000001"]
    assert not stale.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("writer", ["save_file", "torch.save", "_write_json", "_flush"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, writer, code):
    save(tmp_path, 1)

    def full(*_):
        if writer == "save_file":
            raise ckpt.SafetensorError(f"Error while serializing: I/O error: full (os error {code})")
        if writer == "torch.save":  # as torch does: its own error, raised while it handles the system's
            try:
                raise OSError(code, os.strerror(code))
            except OSError:
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(torch if writer == "torch.save" else ckpt, writer.removeprefix("torch."), full)
        with pytest.raises(RunError, match=r"could not be written: .*Free some space, .*--resume"):
            save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["stage0-step000001"]
    assert latest(tmp_path).state.step == 1


def test_a_bug_while_saving_is_not_dressed_up(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("ours")

    monkeypatch.setattr(ckpt, "save_file", broken)
    with pytest.raises(RuntimeError, match="ours"):
        save(tmp_path, 1)


def test_check_same_run_says_what_differs(tmp_path):
    save(tmp_path, 1)
    found = latest(tmp_path)
    check_same_run(found, recipe_hash="r", corpus_fingerprint="c", seed=0)
    with pytest.raises(RunError, match=r"differs in recipe hash \(saved r, now q\)\."):
        check_same_run(found, recipe_hash="q", corpus_fingerprint="c", seed=0)
    with pytest.raises(RunError, match=r"differs in corpus fingerprint \(saved c, now d\) and seed"):
        check_same_run(found, recipe_hash="r", corpus_fingerprint="d", seed=1)


@pytest.mark.parametrize(
    "student, problem",
    [
        ({"weight": torch.zeros(3)}, "bias is not in this student"),
        ({"weight": torch.zeros(3), "bias": torch.zeros(2).bfloat16(), "gate": torch.zeros(1)}, "gate is missing"),
        ({"weight": torch.zeros(4), "bias": torch.zeros(2).bfloat16()}, r"weight is torch.float32 \(3,\), not"),
        ({"weight": torch.zeros(3), "bias": torch.zeros(2)}, "bias is torch.bfloat16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_copied(tmp_path, student, problem):
    save(tmp_path, 1)
    with pytest.raises(RunError, match=problem):
        restore_student(latest(tmp_path), student)
    assert not student["weight"].any()
