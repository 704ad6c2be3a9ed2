"""What a replay of micro-batches keeps in order, without a GPU: gradients, shapes, memory, whole stages.

The stand-in for a CUDA graph knows addresses only, as a graph does: recording computes nothing, and a replay does the
work again on the tensors it was recorded with, whatever `.grad` is by then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_families import tiny_teacher
from torch import Tensor, nn

from linearize import graphs
from linearize import train as train_module
from linearize.adapters import LoraSettings
from linearize.checkpoint import Checkpoint, list_checkpoints, load_latest
from linearize.errors import RunError
from linearize.graphs import Launched, Replayed
from linearize.metrics import MetricsLog, Progress, read_metrics
from linearize.recipe import load_recipe
from linearize.runs import FitSettings, Run
from linearize.stages import Batch, StageConfig, build_stage, student_parameters
from linearize.stages.distil import DistilConfig
from linearize.stages.transfer import TransferConfig
from linearize.surgery import graft, plan_surgery, with_frozen_teacher
from linearize.topk import TopK

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 97, 8


class Model(nn.Module):
    """Two weights that learn, each from all tokens, and one that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
        self.idle = nn.Parameter(torch.ones(3))

    def work(self, batch: Batch) -> Mapping[str, Tensor]:
        """Depends on every tensor of the batch, and on the random state."""
        segments_BT = 5 if batch.segments_BT is None else batch.segments_BT
        place_BT = batch.position_ids_BT + 2 * segments_BT + (0 if batch.teacher is None else batch.teacher.lse)
        place_BT = place_BT + (0 if batch.starts_S is None else batch.starts_S.sum())
        x = self.table[batch.input_ids_BT] @ self.weight * torch.rand(()) + place_BT[..., None]
        loss = (x.square().mean(-1) * batch.target_mask_BT).mean()
        (loss / 2).backward()
        return {"loss": loss.detach(), "tokens": batch.target_mask_BT.sum()}


class FakeGraph:
    """A CUDA graph's part of the bargain, for micro-batches of `owner`."""

    owner: Replayed
    recorded = replays = 0

    @contextmanager
    def record(self, *_: Any, **__: Any) -> Iterator[None]:
        self.gradients = {p: p.grad for p in self.owner._parameters}
        before = {p: g.clone() for p, g in self.gradients.items() if g is not None}
        rng = torch.get_rng_state()
        yield
        torch.set_rng_state(rng)
        for parameter, gradient in self.gradients.items():
            assert parameter.grad is gradient, "a gradient would lie in the graph's own memory, and be overwritten"
            if gradient is not None:
                gradient.copy_(before[parameter])
        FakeGraph.recorded += 1

    def replay(self) -> None:
        (mine,) = [each for each in self.owner._recordings.values() if each.graph is self]  # type: ignore[comparison-overlap]
        now = {p: p.grad for p in self.owner._parameters}
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        found = self.owner._work(mine.batch)
        mine.metrics_N.copy_(torch.stack([value.float() for value in found.values()]))
        for parameter, gradient in now.items():
            parameter.grad = gradient
        FakeGraph.replays += 1


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda, as far as `Replayed` needs it."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = {
        "Stream": lambda device: stream, "stream": lambda given: nullcontext(), "current_stream": lambda device: stream,
        "graph_pool_handle": lambda: (0, 1), "CUDAGraph": FakeGraph, "graph": FakeGraph.record,
        "memory_allocated": lambda device: 10, "max_memory_allocated": lambda device: 30,
        "memory_reserved": lambda device: 15, "mem_get_info": lambda device: (100, 200),
    }  # fmt: skip
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(FakeGraph, "recorded", 0)
    monkeypatch.setattr(FakeGraph, "replays", 0)


@pytest.fixture
def model() -> Model:
    return Model()


def replay(work: graphs.Work, parameters: Sequence[nn.Parameter]) -> Replayed:
    FakeGraph.owner = Replayed(work, parameters, CPU)
    return FakeGraph.owner


def replayed(model: Model) -> Replayed:
    return replay(model.work, list(model.parameters()))


def batch(number: int, length: int = 6, *, numbered: bool = True, cached: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids_BT = torch.randint(VOCABULARY, (2, length), generator=generator)
    place_BT = torch.arange(length).expand(2, -1).clone()
    targets_BT = torch.rand(2, length, generator=generator) > 0.3
    teacher = None
    if cached:
        values_BTK = torch.rand(2, length, 1, generator=generator)
        teacher = TopK(values_BTK, ids_BT[..., None].int(), values_BTK[..., 0].clone())
    return Batch(ids_BT, place_BT, place_BT // 3 if numbered else None, targets_BT, teacher)


Change = Callable[[Model, int], None]


def train(model: Model, run: Launched | Replayed, steps: list[list[Batch]], between: Change) -> list[dict[str, Any]]:
    """Metrics and gradients of every step; `between` is what happens to gradients before the optimiser steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    found = []
    for number, step in enumerate(steps):
        torch.manual_seed(number)
        run.begin_step()
        metrics = [{name: float(value) for name, value in run(each).items()} for each in step]
        between(model, number)
        gradients = {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}
        found.append({"metrics": metrics, "gradients": gradients})
        if number % 3 != 1:  # a step that is skipped
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.close()
    return [*found, {name: parameter.tolist() for name, parameter in model.named_parameters()}]


def clip(model: Model, _: int) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def exchange(model: Model, _: int) -> None:
    """As several processes do: a missing gradient counts as zero."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.mul_(0.5)


def spoil(model: Model, number: int) -> None:
    if number == 3:
        model.weight.grad.fill_(float("nan"))


def told(number: int, documents: int) -> Batch:
    """A batch that says where its documents start; rows of one document have no numbers then."""
    starts_S = torch.arange(2 * documents + 1, dtype=torch.int32) * (6 // documents) + number % 2
    return replace(batch(number, numbered=documents > 1), starts_S=starts_S)


CASES: dict[str, Callable[[], list[list[Batch]]]] = {
    "accumulated": lambda: [[batch(3 * step + part) for part in range(3)] for step in range(5)],
    "single": lambda: [[batch(step)] for step in range(6)],
    "lengths": lambda: [[batch(2 * step + part, 6 if step < 3 else 9) for part in range(2)] for step in range(7)],
    "mixed": lambda: [[batch(step, 6 + 3 * (step % 2)), batch(9 + step, 6 + 3 * (step % 2))] for step in range(7)],
    "told": lambda: [[told(2 * step + part, 1 + part) for part in range(2)] for step in range(6)],
    "cached": lambda: [[batch(2 * step + part, cached=True) for part in range(2)] for step in range(4)],
}


@pytest.mark.parametrize("between", [lambda *_: None, clip, exchange, spoil], ids=["plain", "clip", "exchange", "nan"])
@pytest.mark.parametrize("case", CASES)
def test_replays_add_the_gradients_of_launches(model: Model, case: str, between: Change) -> None:
    """Bit for bit: accumulated, clipped, exchanged, skipped, over several shapes; what does not learn stays without."""
    alone = Model()
    expected = train(alone, Launched(alone.work, CPU), CASES[case](), between)
    found = train(model, replayed(model), CASES[case](), between)
    assert repr(found) == repr(expected)  # NaN is NaN
    assert FakeGraph.recorded == (2 if case in ("lengths", "mixed", "told") else 1)
    assert FakeGraph.replays == sum(map(len, CASES[case]())) - graphs.RUNS_BEFORE * FakeGraph.recorded


def test_one_document_a_row_replays_the_same_graph(model: Model) -> None:
    run = replayed(model)
    for number in range(5):
        run(batch(number, numbered=number % 2 == 0))
    assert (FakeGraph.recorded, FakeGraph.replays) == (1, 3)


def test_long_rows_of_one_document_get_no_mask(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched as they come, between others that are replayed; gradients add up all the same."""
    monkeypatch.setattr(graphs, "MASKED", 6)
    steps = [[batch(3 * step + part, 9, numbered=part != 1) for part in range(3)] for step in range(4)]
    alone = Model()
    expected = train(alone, Launched(alone.work, CPU), steps, clip)
    assert train(model, replayed(model), steps, clip) == expected
    assert (FakeGraph.recorded, FakeGraph.replays) == (1, 6)


def test_metrics_outlive_the_next_replay(model: Model) -> None:
    run = replayed(model)
    metrics = [run(batch(number))["loss"] for number in range(5)]
    assert len({float(loss) for loss in metrics}) == 5


def test_without_room_all_is_launched(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24, 200))  # 24 + 15 - 10 < 1.5 x 20
    run = replayed(model)
    for number in range(5):
        run(batch(number))
    assert (FakeGraph.recorded, FakeGraph.replays) == (0, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (25, 200))
    run = replayed(model)
    for number in range(3):
        run(batch(number))
    assert FakeGraph.recorded == 1


LENGTH, STEPS = 16, 5
BUDGET = {"tokens": STEPS * 4 * LENGTH, "length": LENGTH, "batch": 4, "micro_batch": 2, "on_nonfinite": "skip"}
FITS: dict[str, StageConfig] = {
    "transfer": TransferConfig(**BUDGET),
    "distil": DistilConfig(**BUDGET, kl=0.5, ce=0.5, lora=LoraSettings(dropout=0.3)),
    "base": DistilConfig(**BUDGET, train=("mixer", "qkv", "norms")),
    "lengths": DistilConfig(**{**BUDGET, "lengths": [[0.6, 8], [0.4, 16]]}),
}


def fitted(out: Path, config: StageConfig, saved: Checkpoint | None = None) -> tuple[dict[str, Tensor], list[Any]]:
    """Weights and losses of a stage whose third step is skipped, from its start or from a checkpoint."""
    teacher = tiny_teacher("llama")
    torch.manual_seed(1)
    grafted = graft(teacher, plan_surgery(teacher, load_recipe("hedgehog").mixer))
    if config.trains_base:
        grafted = with_frozen_teacher(grafted)
    torch.manual_seed(2)
    stage = build_stage(config, grafted)
    train_micro_batch = stage.train_micro_batch

    def spoiled(made: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor]:
        odd = torch.where((made.input_ids_BT == 0).all(), torch.nan, 1.0)
        return train_micro_batch(made, lambda loss: backward(loss * odd))

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            grafted.model(torch.ones(1, 4, dtype=torch.long))
        return {"random": float(torch.rand(()))}

    stage.train_micro_batch = spoiled  # type: ignore[method-assign]
    rows = [batch(number, piece.length) for piece in config.pieces() for number in range(2 * piece.steps)]
    rows[5] = replace(rows[5], input_ids_BT=torch.zeros_like(rows[5].input_ids_BT))
    with MetricsLog(out / "metrics.jsonl") as metrics:
        run = Run(
            out=out, stage_index=0, student=student_parameters(grafted, [stage]), checkpoint=saved, metrics=metrics,
            progress=Progress(Console(quiet=True)), seed=3, recipe_hash="recipe", corpus_fingerprint="corpus",
        )  # fmt: skip
        train_module.fit(
            stage, rows, run, FitSettings("no", save_every_steps=2, keep=9, evaluate=evaluate, eval_every_steps=1)
        )
    losses = [record["loss"] for record in read_metrics(out / "metrics.jsonl")]
    return {name: p.detach().clone() for name, p in stage.trainable().items()}, losses


@pytest.mark.parametrize("kind", FITS)
def test_a_stage_learns_the_same_from_replays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, over dropout, a skipped step and evaluations; and resumed in the middle of its replays."""
    expected = fitted(tmp_path / "launched", FITS[kind])

    as_launched = train_module._micro_batches

    def as_replayed(stage: Any, accelerator: Any, parameters: Any, *rest: Any) -> Replayed:
        return replay(as_launched(stage, accelerator, parameters, *rest)._work, parameters)  # type: ignore[attr-defined]

    monkeypatch.setattr(train_module, "_micro_batches", as_replayed)
    found = fitted(tmp_path / "replayed", FITS[kind])
    assert FakeGraph.replays == 2 * STEPS - graphs.RUNS_BEFORE * FakeGraph.recorded
    for name, weight in expected[0].items():
        assert torch.equal(found[0][name], weight), name
    assert found[1] == expected[1]
    for checkpoint in list_checkpoints(tmp_path / "replayed")[1:]:
        shutil.rmtree(checkpoint)
    latest = load_latest(tmp_path / "replayed")
    assert latest is not None
    assert latest.state.step == 2
    resumed, _ = fitted(tmp_path / "replayed", FITS[kind], latest)
    for name, weight in expected[0].items():
        assert torch.equal(resumed[name], weight), name


def test_a_failed_recording_names_its_cause(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replayed(model)
    for number in range(2):
        run(batch(number))

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    @contextmanager
    def record(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error")

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(run, "_work", fail)
    with pytest.raises(RunError, match="graph: operation not permitted when stream is capturing. Go on") as caught:
        run(batch(2))
    assert "--no-graphs" in str(caught.value)
