"""What the training loop refuses, and faults that stop it: bad numbers, full disks. The weights are kept."""

import io
import math
import threading
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from linearize import checkpoint
from linearize.checkpoint import list_checkpoints
from linearize.errors import NonFiniteLossError, RunError
from linearize.metrics import Progress, read_metrics
from linearize.stages.base import StageConfig
from linearize.train import FitSettings, RunInterrupted, fit
from tests.toy_training import (
    ToyModel,
    ToyStage,
    assert_same_weights,
    latest,
    make_run,
    stage_config,
    stop_at,
    toy_batches,
    train_toy,
)


def test_a_used_folder_is_refused_without_resume(tmp_path):
    train_toy(tmp_path)
    with pytest.raises(RunError, match="already holds"):
        train_toy(tmp_path)


@pytest.mark.parametrize("what", ["recipe_hash", "corpus_fingerprint"])
def test_another_recipe_or_corpus_is_refused(tmp_path, what):
    train_toy(tmp_path)
    model = ToyModel()
    run = replace(make_run(tmp_path, model, resume=True), **{what: "other"})
    with pytest.raises(RunError, match=what.replace("_", " ")):
        fit(ToyStage(model, stage_config()), toy_batches(20, 2), run, FitSettings())


def test_a_budget_below_one_batch_is_refused(tmp_path):
    config = StageConfig(kind="toy", tokens=20, length=6, batch=4, micro_batch=2)
    with pytest.raises(RunError, match=r"20 tokens .* = 24\. .*--tokens 24.*--set stages\.0\.batch=3"):
        train_toy(tmp_path, config)


def test_too_few_batches_are_refused(tmp_path):
    model = ToyModel()
    with pytest.raises(RunError, match="10 steps need 20 micro-batches of 2 rows; the corpus gives 19"):
        fit(ToyStage(model, stage_config()), toy_batches(19, 2), make_run(tmp_path, model), FitSettings())


def test_a_stage_that_trains_nothing_is_refused(tmp_path):
    class Idle(ToyStage):
        def trainable(self):
            return {}

    model = ToyModel()
    with pytest.raises(RunError, match="trains no parameter"):
        fit(Idle(model, stage_config()), toy_batches(20, 2), make_run(tmp_path, model), FitSettings())


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_non_finite_stops_before_the_step(tmp_path, fault):
    """Steps 1 to 4 are taken; micro-batch 9 (the second of step 5) is bad."""
    model, config = ToyModel(), stage_config()
    seen = {}

    class Bad(ToyStage):
        def train_micro_batch(self, batch, backward):
            if self.calls == 8:
                seen.update({name: p.detach().clone() for name, p in model.named_parameters()})
            if self.calls != 9:
                return super().train_micro_batch(batch, backward)
            loss = (self.model.first.weight.sum() * 0).sqrt()  # 0, with an infinite slope: a NaN gradient
            backward(loss)
            return {
                "loss": loss.detach() * (math.nan if fault == "loss" else 1),
                **dict.fromkeys(["penalty", "noise"], loss),
            }

    run = make_run(tmp_path, model)
    expected = "micro-batch 9: loss nan" if fault == "loss" else "micro-batches 8 to 9: gradient norm nan"
    with pytest.raises(NonFiniteLossError, match=expected) as error:
        fit(Bad(model, config), toy_batches(20, 2), run, FitSettings())
    run.metrics.close()
    assert all(word in str(error.value) for word in ("toy", "step 5 of 10", "optimizer.lr"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, seen[name]), name
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4

    # the checkpoint is usable: with the fault gone, the run ends as if it had never been
    assert latest(tmp_path).state.step == 4
    # (in the same process and model too, where the bad gradients still lie)
    _, whole_model = train_toy(tmp_path / "whole")
    again = make_run(tmp_path, model, resume=True)
    fit(ToyStage(model, config), toy_batches(20, 2), again, FitSettings())
    again.metrics.close()
    assert_same_weights(whole_model, model)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_kept(tmp_path, monkeypatch, background):
    saves, save_file = [], checkpoint.save_file

    def full(*arguments):
        saves.append(arguments)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        train_toy(tmp_path, settings=FitSettings(save_every_steps=2, save_in_background=background))
    monkeypatch.undo()
    assert latest(tmp_path).state.step == 4
    assert train_toy(tmp_path, resume=True)[0].steps == 10


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(tmp_path, monkeypatch):
    may_write, seen = threading.Event(), []
    save_file = checkpoint.save_file

    def slow(*arguments):
        assert may_write.wait(60)
        save_file(*arguments)

    def before(index):
        if index == 7:  # in step 4: the copy of step 2 is not written yet
            seen.append(list_checkpoints(tmp_path / "slow"))
            may_write.set()

    monkeypatch.setattr(checkpoint, "save_file", slow)
    _, model = train_toy(tmp_path / "slow", before=before, settings=FitSettings(save_every_steps=2, keep=9))
    assert seen == [[]]
    monkeypatch.undo()
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "slow")] == ["02", "04", "06", "08", "10"]
    _, other = train_toy(tmp_path / "now", settings=FitSettings(save_every_steps=2, keep=9, save_in_background=False))
    assert_same_weights(model, other)
    for one, two in zip(list_checkpoints(tmp_path / "slow"), list_checkpoints(tmp_path / "now"), strict=True):
        assert (one / checkpoint.STUDENT).read_bytes() == (two / checkpoint.STUDENT).read_bytes()


def test_no_write_is_under_way_after_an_error(tmp_path, monkeypatch):
    started, save_file = threading.Event(), checkpoint.save_file

    def slow(*arguments):
        started.set()
        threading.Event().wait(0.3)
        save_file(*arguments)

    def before(index):
        if index == 5:
            assert started.wait(60)
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", slow)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path, before=before, settings=FitSettings(save_every_steps=2))
    assert latest(tmp_path).state.step == 2


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_bad_batch_is_skipped_by_choice(tmp_path, fault):
    """Step 5 is skipped: its weights are those of step 4, and the run goes on; so does one that was stopped there."""

    class Bad(ToyStage):
        first = 0

        def train_micro_batch(self, batch, backward):
            found = super().train_micro_batch(batch, backward)
            if self.first + self.calls - 1 == 9:
                weight = self.model.first.weight
                backward((weight.sum() * 0).sqrt())  # 0, with an infinite slope
                found = {**found, "loss": found["loss"] * (math.nan if fault == "loss" else 1)}
            return found

    config = stage_config().model_copy(update={"on_nonfinite": "skip"})
    model, said = ToyModel(), io.StringIO()
    run = replace(make_run(tmp_path / "whole", model), progress=Progress(Console(file=said, width=400)))
    fit(Bad(model, config), toy_batches(20, 2), run, FitSettings(save_every_steps=1, keep=10))
    run.metrics.close()
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [record.get("skipped") for record in records] == [1 if step == 5 else None for step in range(1, 11)]
    assert (records[4]["loss"] is None) == (fault == "loss")
    assert "Skipped step 5 of stage 0 (toy): micro-batch" in said.getvalue()
    before, after = (load_file(list_checkpoints(tmp_path / "whole")[step] / checkpoint.STUDENT) for step in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    again = ToyModel()
    with pytest.raises(RunInterrupted):
        fit(
            Bad(again, config, stop_at(8)),
            toy_batches(20, 2),
            make_run(tmp_path / "parts", again),
            FitSettings(),
        )
    rest = Bad(again, config)
    rest.first = 10
    fit(rest, toy_batches(20, 2), make_run(tmp_path / "parts", again, resume=True), FitSettings())
    assert_same_weights(model, again)


def test_too_many_skips_in_a_row_end_the_run_also_over_a_resume(tmp_path):
    class Bad(ToyStage):
        def train_micro_batch(self, batch, backward):
            found = super().train_micro_batch(batch, backward)
            return {**found, "loss": found["loss"] * math.nan}

    config = stage_config().model_copy(update={"on_nonfinite": "skip", "max_skips": 3})
    model = ToyModel()
    with pytest.raises(RunInterrupted):
        fit(Bad(model, config, stop_at(3)), toy_batches(20, 2), make_run(tmp_path, model), FitSettings())
    with pytest.raises(NonFiniteLossError, match=r"step 4 of 10: .*3 steps in a row were skipped before it"):
        fit(Bad(model, config), toy_batches(20, 2), make_run(tmp_path, model, resume=True), FitSettings())
    assert_same_weights(model, ToyModel())
