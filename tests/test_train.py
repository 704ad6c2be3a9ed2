"""The training loop: interrupted and resumed = uninterrupted, to the last bit, and what it computes and says."""

import io
import math
import os
import random
import signal
import threading
from dataclasses import replace
from typing import Literal

import pytest
import torch
from rich.console import Console

from linearize import checkpoint, train
from linearize.checkpoint import list_checkpoints, read_trainer, restore_student
from linearize.metrics import TIMING_FIELDS, MetricsLog, Progress, Throughput, read_metrics
from linearize.stages.base import Batch, OptimizerConfig
from linearize.train import FitSettings, RunInterrupted, fit, learning_rate
from tests.toy_training import (
    LENGTH,
    ToyModel,
    ToyStage,
    assert_same_weights,
    latest,
    make_run,
    stage_config,
    stop_at,
    toy_batches,
    train_toy,
    without_timing,
)

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# ------------------------------------------------------------------------------------------ interrupt and resume


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("batch, micro_batch", [(2, 2), (6, 2)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, batch, micro_batch, mixed_precision, device):
    config = stage_config(steps=12, batch=batch, micro_batch=micro_batch)
    settings = FitSettings(mixed_precision, evaluate=lambda: {"noise": torch.rand(()).item()}, eval_every_steps=4)
    whole, whole_model = train_toy(tmp_path / "whole", config, settings=settings, device=device)

    out, calls, first = tmp_path / "parts", config.accumulation, 0
    places = random.Random(f"{batch} {mixed_precision} {device}")
    steps = sorted(places.sample(range(1, 12), 3))
    for count, step in enumerate(steps):
        within = places.randrange(calls)
        with pytest.raises(RunInterrupted, match=rf"SIGTERM after step {step} of 12 .*--resume"):
            train_toy(out, config, count > 0, stop_at((step - 1 - first) * calls + within), settings, device=device)
        first = step
    parts, parts_model = train_toy(out, config, True, settings=settings, device=device)

    assert_same_weights(whole_model, parts_model)
    assert without_timing(out / "metrics.jsonl") == without_timing(tmp_path / "whole" / "metrics.jsonl")
    assert len(read_metrics(out / "metrics.jsonl")) == 12
    assert (parts.steps, parts.tokens, parts.metrics) == (whole.steps, whole.tokens, whole.metrics)
    assert parts.seconds > 0
    assert parts.tokens_per_second == pytest.approx(parts.tokens / parts.seconds)
    optimizers = [read_trainer(latest(tmp_path / name))["optimizer"] for name in ("whole", "parts")]
    for index, was in optimizers[0]["state"].items():
        assert all(torch.equal(was[key], optimizers[1]["state"][index][key]) for key in was)


def test_killed_between_saves_equals_uninterrupted(tmp_path):
    """A hard kill loses the steps since the last save, and leaves their records and half a line in metrics.jsonl."""
    _, whole_model = train_toy(tmp_path / "whole")
    out = tmp_path / "parts"

    def die(index):
        if index == 15:  # in step 8
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_toy(out, before=die, settings=FitSettings(save_every_steps=3))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"stage": 0, "step": 8, "lo')
    assert [path.name for path in list_checkpoints(out)] == ["stage0-step000003", "stage0-step000006"]
    _, model = train_toy(out, resume=True)
    assert_same_weights(whole_model, model)
    assert without_timing(out / "metrics.jsonl") == without_timing(tmp_path / "whole" / "metrics.jsonl")


def test_killed_before_the_first_save_starts_over(tmp_path):
    _, whole_model = train_toy(tmp_path / "whole")
    out = tmp_path / "parts"

    def die(index):
        if index == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_toy(out, before=die)
    _, model = train_toy(out, resume=True)
    assert_same_weights(whole_model, model)
    assert without_timing(out / "metrics.jsonl") == without_timing(tmp_path / "whole" / "metrics.jsonl")


def test_killed_while_saving_goes_on_from_the_earlier_checkpoint(tmp_path, monkeypatch):
    _, whole_model = train_toy(tmp_path / "whole")
    out, flushed = tmp_path / "parts", []
    flush = checkpoint._flush

    def die_in_the_second_save(path):
        flushed.append(path)
        if len(flushed) == 9:
            raise KeyboardInterrupt
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr("linearize.checkpoint._flush", die_in_the_second_save)
        with pytest.raises(KeyboardInterrupt):
            train_toy(out, settings=FitSettings(save_every_steps=2))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["stage0-step000002"]
    _, model = train_toy(out, resume=True)
    assert_same_weights(whole_model, model)


def test_how_often_one_saves_and_evaluates_changes_nothing(tmp_path):
    _, plain = train_toy(tmp_path / "plain")
    noisy = FitSettings(
        save_every_steps=1, evaluate=lambda: {"x": torch.rand(3).sum().item()}, eval_every_steps=1, keep=1
    )
    _, busy = train_toy(tmp_path / "busy", settings=noisy)
    assert_same_weights(plain, busy)
    assert len(list_checkpoints(tmp_path / "busy")) == 1


def test_resuming_a_finished_stage_takes_no_step_and_says_the_same(tmp_path):
    first, model = train_toy(tmp_path)
    again, again_model = train_toy(tmp_path, resume=True, before=lambda index: pytest.fail("trained"))
    assert_same_weights(model, again_model)
    assert replace(again, peak_memory_bytes=0) == replace(first, peak_memory_bytes=0)


def test_an_interrupt_in_the_last_step_still_interrupts(tmp_path):
    with pytest.raises(RunInterrupted, match="step 10 of 10"):
        train_toy(tmp_path, before=stop_at(19))
    assert latest(tmp_path).state.finished


def test_a_second_interrupt_stops_at_once_and_handlers_come_back(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def twice(index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path, before=twice)
    assert list_checkpoints(tmp_path) == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train_toy(tmp_path)[0]))
    thread.start()
    thread.join()
    assert results[0].steps == 10


def test_a_second_stage_starts_after_the_first_and_keeps_its_metrics(tmp_path):
    train_toy(tmp_path)
    before = read_metrics(tmp_path / "metrics.jsonl")
    model = ToyModel()
    run = make_run(tmp_path, model, stage_index=1)
    config = stage_config(steps=3)
    restore_student(latest(tmp_path), run.student)
    fit(ToyStage(model, config), toy_batches(6, 2), run, FitSettings())
    run.metrics.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[:10] == before
    assert [(record["stage"], record["step"]) for record in records[10:]] == [(1, 1), (1, 2), (1, 3)]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["stage0-step000010", "stage1-step000003"]


# --------------------------------------------------------------------------------------------- what is computed


def test_accumulation_equals_one_big_batch(tmp_path):
    _, big = train_toy(tmp_path / "big", stage_config(batch=8, micro_batch=8), dropout=0.0)
    model, config = ToyModel(0.0), stage_config(batch=8, micro_batch=2)
    small = []
    for batch in toy_batches(10, 8):
        for rows in range(0, 8, 2):
            part = slice(rows, rows + 2)
            small.append(Batch(batch.input_ids_BT[part], batch.position_ids_BT[part], None, batch.target_mask_BT[part]))
    fit(ToyStage(model, config), small, make_run(tmp_path / "small", model), FitSettings())
    for (name, was), now in zip(big.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(was, now[1], rtol=0, atol=1e-6, msg=name)
    one, many = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("big", "small"))
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in one] == pytest.approx([record[key] for record in many], abs=1e-6)


def test_it_learns_and_trains_only_the_stage_s_parameters(tmp_path):
    result, model = train_toy(tmp_path, stage_config(steps=60), dropout=0.0)
    fresh = ToyModel()
    assert torch.equal(model.idle.weight, fresh.idle.weight)
    assert not model.idle.weight.requires_grad
    assert model.first.weight.requires_grad
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert set(records[0]) == {
        *("stage", "name", "step", "tokens", "loss", "penalty", "noise", "grad_norm", "lr"),
        *TIMING_FIELDS,
    }
    assert records[-1]["tokens"] == result.tokens == 60 * 4 * LENGTH
    assert result.peak_memory_bytes > 2**20


def test_clipping_bounds_what_the_optimiser_sees_and_logs_the_norm_before(tmp_path):
    seen = []

    def clipped(optimizer, lr, original=train._optimizer_step):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        original(optimizer, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_optimizer_step", clipped)
        train_toy(tmp_path, stage_config(clip=1e-3))
    assert seen == pytest.approx([1e-3] * 10, rel=1e-2)
    assert all(record["grad_norm"] > 0.1 for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_bf16_runs_the_forward_in_bf16_and_keeps_fp32_weights_and_gradients(tmp_path):
    dtypes = []

    class Spy(ToyModel):
        def forward(self, ids_BT):
            logits_BTV = super().forward(ids_BT)
            dtypes.append(logits_BTV.dtype)
            return logits_BTV

    cases: list[tuple[Literal["no", "bf16"], torch.dtype]]
    cases = [("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)]
    for precision, expected in cases:
        model = Spy()
        out = tmp_path / f"{precision}{len(dtypes)}"
        fit(ToyStage(model, stage_config()), toy_batches(20, 2), make_run(out, model), FitSettings(precision))
        assert dtypes[-1] is expected
        assert model.first.weight.dtype is torch.float32
        state = read_trainer(latest(out))["optimizer"]["state"]
        assert state[0]["exp_avg"].dtype is torch.float32


def test_a_metric_of_the_stage_may_be_nan(tmp_path):
    class Odd(ToyStage):
        def train_micro_batch(self, batch, backward):
            return {**super().train_micro_batch(batch, backward), "quantile": torch.tensor(math.nan)}

    model = ToyModel()
    result = fit(Odd(model, stage_config()), toy_batches(20, 2), make_run(tmp_path, model), FitSettings())
    assert result.metrics["quantile"] is None
    assert [record["quantile"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [None] * 10
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_evaluation_is_logged_with_its_step_and_not_timed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])

    def second(index):
        now[0] += 0.5  # two micro-batches a step

    def evaluate():
        now[0] += 1000.0
        return {"kl": 0.25}

    result, _ = train_toy(tmp_path, before=second, settings=FitSettings(evaluate=evaluate, eval_every_steps=4))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "eval/kl" in record] == [4, 8, 10]
    assert result.metrics["eval/kl"] == 0.25
    assert result.seconds == 10.0
    assert records[-1]["tokens_per_second"] == 4 * LENGTH


def config_of(schedule, **fields):
    return OptimizerConfig(lr=1.0, schedule=schedule, **fields)


@pytest.mark.parametrize(
    "config, expected",
    [
        # two steps of warm-up, then half a cosine over five: 1 at its start, 0.1 at its end
        (
            config_of("cosine", warmup=2 / 7, min_lr_ratio=0.1),
            [1 / 3, 2 / 3, 1.0, 0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1 + 0.9 * (2 - 2**0.5) / 4, 0.1],
        ),
        (config_of("constant", warmup=0.25), [0.5, 1.0, 1.0, 1.0]),
        (config_of("constant", warmup=0), [1.0, 1.0]),
        # one step of warm-up, then at the peak until the last four of ten go down by 0.2 each
        (config_of("wsd", warmup=0.1, decay=0.4, min_lr_ratio=0.2), [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (config_of("wsd", warmup=0.5, decay=1.0, min_lr_ratio=0.0), [1 / 3, 2 / 3, 0.5, 0.0]),  # no room for all of it
        (config_of("wsd", warmup=0, decay=0), [1.0, 1.0, 1.0]),
        (config_of("cosine"), [1.0]),  # a single step is at the peak
    ],
)
def test_learning_rate(config, expected):
    steps = len(expected)
    assert [learning_rate(step, steps, config) for step in range(steps)] == pytest.approx(expected)


def test_the_schedule_reaches_the_optimiser(tmp_path):
    train_toy(tmp_path)
    logged = [record["lr"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert logged == [learning_rate(step, 10, stage_config().optimizer) for step in range(10)]


# --------------------------------------------------------------------------------------------------- metrics


def test_truncate_after_keeps_what_is_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for stage, step in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]:
            log.write({"stage": stage, "step": step})
        log.truncate_after(1, 2)
        log.write({"stage": 1, "step": 3, "again": True})
        assert [(record["stage"], record["step"]) for record in read_metrics(path)] == [
            (0, 1), (0, 2), (1, 1), (1, 2), (1, 3),
        ]  # fmt: skip
        assert read_metrics(path)[-1]["again"]
        log.truncate_after(1, 0)
        assert len(read_metrics(path)) == 2


def test_throughput_moves_with_its_window():
    throughput = Throughput(window=2)
    assert throughput.tokens_per_second == 0
    for tokens, seconds in [(1000, 100.0), (10, 1.0), (30, 1.0)]:
        throughput.add(tokens, seconds)
    assert throughput.tokens_per_second == 20
    assert throughput.seconds_per_step == 1


def test_a_log_file_gets_plain_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("linearize.metrics.time.monotonic", lambda: now[0])
    text = io.StringIO()
    throughput = Throughput()
    throughput.add(100, 30.0)
    with Progress(Console(file=text, width=40)).stage("transfer", steps=100) as progress:
        for step in range(1, 31):
            now[0] += 30.0 if 12 <= step <= 13 else 0.1
            progress.update(step, {"loss": 1.5, "grad_norm": 3.0}, throughput)
    lines = text.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/100", "10/100", "12/100", "13/100", "20/100", "30/100"]
    assert lines[0] == "transfer step 1/100  loss 1.5  3 tokens/s  0:00 elapsed, 49:30 to go"


def test_a_terminal_gets_a_bar():
    text = io.StringIO()
    with Progress(Console(file=text, force_terminal=True, width=160)).stage("distil", 10, done=4) as progress:
        progress.update(5, {"loss": 1.5}, Throughput())
    assert "5/10" in text.getvalue()
    assert "loss 1.5" in text.getvalue()
