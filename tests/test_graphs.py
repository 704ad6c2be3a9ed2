"""Micro-batches replayed from CUDA graphs learn what launched ones learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from linearize import packed
from linearize.adapters import LoraSettings
from linearize.graphs import Launched, Replayed, obstacle
from linearize.metrics import MetricsLog, Progress, read_metrics
from linearize.packed import softmax_by_document
from linearize.recipe import load_recipe
from linearize.runs import FitSettings, Run
from linearize.stages import Batch, StageConfig, build_stage, student_parameters
from linearize.stages.distil import DistilConfig
from linearize.stages.forcing import StudentForcing
from linearize.stages.transfer import TransferConfig
from linearize.stages.watch import StopConfig, WatchConfig
from linearize.streaming import stream_layers
from linearize.surgery import Graft, graft, plan_surgery, with_frozen_teacher
from linearize.train import fit

MakeTeacher = Callable[..., PreTrainedModel]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTH, ROWS, STEPS = 256, 4, 6
RECIPES = ("hedgehog", "lawcat", "lizard", "lolcats", "liger", "gdn", "ahn", "mamba2-mimic", "mmmamba", "swa-sink")


def batches(count: int, numbered: bool) -> list[Batch]:
    """Rows of one to three documents; in every third batch each row is one, and may go without a number."""
    random = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ends = torch.randint(1, LENGTH, (ROWS, 2), generator=random) if number % 3 else torch.full((ROWS, 2), LENGTH)
        place_BT = torch.arange(LENGTH).expand(ROWS, -1)
        segments_BT = (place_BT[..., None] >= ends[:, None]).sum(-1)
        starts_BT = torch.where(segments_BT.diff(dim=1, prepend=segments_BT[:, :1]) != 0, place_BT, 0).cummax(1).values
        targets_BT = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        targets_BT[:, :-1] = segments_BT[:, 1:] == segments_BT[:, :-1]
        ids_BT = torch.randint(2, 97, (ROWS, LENGTH), generator=random)
        packed = segments_BT if numbered or number % 3 else None
        made.append(Batch(ids_BT, place_BT - starts_BT, packed, targets_BT))
    return made


Trained = tuple[dict[str, Tensor], list[dict[str, Any]]]
"""Weights and metrics of one stage."""


def train(out: Path, grafted: Graft, config: StageConfig, graphs: bool, by_document: bool = False) -> Trained:
    grafted.model.requires_grad_(False)
    torch.manual_seed(5)
    stage = build_stage(config, grafted)
    with MetricsLog(out / "metrics.jsonl") as metrics:
        run = Run(
            out=out, stage_index=0, student=student_parameters(grafted, [stage]), checkpoint=None, metrics=metrics,
            progress=Progress(Console(quiet=True)), seed=3, recipe_hash="recipe", corpus_fingerprint="corpus",
        )  # fmt: skip
        rows = batches(config.steps * config.accumulation, not graphs and not by_document)
        with softmax_by_document(grafted, "bf16") if by_document else nullcontext(False) as told:
            assert told == by_document
            fit(stage, rows, run, FitSettings("bf16", graphs=graphs, by_document=told))
    drop = ("seconds", "tokens_per_second")
    records = [
        {name: x for name, x in each.items() if name not in drop} for each in read_metrics(out / "metrics.jsonl")
    ]
    return {name: p.detach().clone() for name, p in stage.trainable().items()}, records


@pytest.fixture
def new_graft(make_teacher: MakeTeacher) -> Callable[..., Graft]:
    def make(recipe: str, keep: Sequence[int] = ()) -> Graft:
        model = make_teacher(hidden_size=128, head_dim=32).to("cuda", torch.bfloat16)
        torch.manual_seed(1)
        chosen = load_recipe(recipe)
        return graft(model, plan_surgery(model, chosen.mixer, tuple(keep)))

    return make


BUDGET = {"tokens": STEPS * 2 * ROWS * LENGTH, "length": LENGTH, "batch": 2 * ROWS, "micro_batch": ROWS}
LORA = LoraSettings(dropout=0.3)


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=gpu) for name in RECIPES])
@pytest.mark.parametrize("kind", ["transfer", "distil"])
def test_replayed_equals_launched(
    tmp_path: Path, new_graft: Callable[[str], Graft], recipe: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses and weights, over accumulated micro-batches, dropout, and rows with and without several documents."""
    caplog.set_level("INFO", "linearize.graphs")
    if kind == "transfer" and recipe in ("liger", "swa-sink"):
        pytest.skip("its mixer has no weights")
    config: StageConfig = (
        TransferConfig(**BUDGET) if kind == "transfer" else DistilConfig(**BUDGET, kl=0.5, ce=0.5, lora=LORA)
    )
    found = [train(tmp_path / str(graphs), new_graft(recipe), config, graphs) for graphs in (False, True)]
    assert "recorded a CUDA graph" in caplog.text
    assert_same(*found)


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=gpu) for name in ("hedgehog", "lawcat", "lizard")])
@pytest.mark.parametrize("kind", ["transfer", "distil"])
def test_softmax_that_is_told_documents_learns_what_a_masked_one_does(
    tmp_path: Path,
    new_graft: Callable[..., Graft],
    recipe: str,
    kind: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launched and replayed alike to the tolerance of this file; against masks, other kernels round bf16 otherwise."""
    monkeypatch.setattr(packed, "SHORTEST", 0)
    caplog.set_level("INFO", "linearize.graphs")
    config = TransferConfig(**BUDGET) if kind == "transfer" else DistilConfig(**BUDGET, kl=0.5, ce=0.5, lora=LORA)
    keep = (1,) if kind == "distil" else ()  # a softmax layer that gradients pass through
    launched, replayed = (
        train(tmp_path / str(graphs), new_graft(recipe, keep), config, graphs, by_document=True)
        for graphs in (False, True)
    )
    assert "recorded a CUDA graph" in caplog.text
    assert_same(launched, replayed)
    _, masked = train(tmp_path / "masked", new_graft(recipe, keep), config, False)
    assert [one["loss"] for one in masked] == pytest.approx([one["loss"] for one in launched[1]], rel=1e-2)


OTHERS = {
    "qkv and o, hidden states": TransferConfig(**BUDGET, train=("mixer", "qkv", "o"), objective={"hidden": 1.0}),
    "rows": TransferConfig(**BUDGET, objective={"mse": 1.0, "matrix": 0.5, "attention_ce": 0.5}),
    "all weights": DistilConfig(**BUDGET, train=("all",)),
    "qkv and norms": DistilConfig(**BUDGET, train=("mixer", "qkv", "norms")),
    "the likeliest tokens": DistilConfig(**BUDGET, top_k=8, lora=LORA),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in OTHERS])
def test_other_parts_and_losses_are_recorded_too(
    tmp_path: Path, new_graft: Callable[[str], Graft], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "linearize.graphs")
    config, found = OTHERS[name], []
    for graphs in (False, True):
        grafted = new_graft("hedgehog")
        found.append(
            train(
                tmp_path / str(graphs), with_frozen_teacher(grafted) if config.trains_base else grafted, config, graphs
            )
        )
    assert "recorded a CUDA graph" in caplog.text
    assert_same(*found)


def assert_same(launched: Trained, replayed: Trained) -> None:
    (before, ones), (after, others) = launched, replayed
    assert len(ones) == STEPS
    for one, other in zip(ones, others, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name, weight in before.items():
        torch.testing.assert_close(weight, after[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=gpu) for name in ("hedgehog", "lizard", "gdn")])
def test_which_micro_batches_are_launched_does_not_matter(new_graft: Callable[[str], Graft], recipe: str) -> None:
    """A resumed run launches its first micro-batches, where the uninterrupted one replays: gradients are the same."""
    config, device = DistilConfig(**BUDGET, lora=LORA), torch.device("cuda")

    def gradients(launched: int) -> list[Tensor]:
        torch.manual_seed(2)
        grafted = new_graft(recipe)
        stage = build_stage(config, grafted)
        parameters = list(stage.trainable().values())
        for parameter in parameters:
            parameter.requires_grad_(True)

        def work(batch: Batch) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                return stage.train_micro_batch(batch, lambda loss: loss.backward())

        replayed, alone = Replayed(work, parameters, device), Launched(work, device)
        for number, batch in enumerate(batches(6, True)):
            torch.manual_seed(number)
            for parameter in parameters:
                parameter.grad = None
            replayed.begin_step()
            (alone if number < launched else replayed)(batch)
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    one, two = gradients(0), gradients(6)
    assert len(one) == len(two) > 0
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_recorded_says_why(make_teacher: MakeTeacher) -> None:
    model = make_teacher(attn_implementation="sdpa")
    grafted = graft(model, plan_surgery(model, load_recipe("hedgehog").mixer))
    plain = TransferConfig(tokens=1)
    assert obstacle(plain, grafted) == ""
    assert obstacle(DistilConfig(tokens=1), grafted) == ""
    assert "forcing" in obstacle(TransferConfig(tokens=1, student_forcing=StudentForcing()), grafted)
    assert "watch" in obstacle(TransferConfig(tokens=1, watch=WatchConfig(stop=StopConfig())), grafted)
    assert obstacle(TransferConfig(tokens=1, objective={"attention_ce": 1.0, "matrix": 1.0}), grafted) == ""
    assert "recomputed" in obstacle(DistilConfig(tokens=1, checkpoint_activations=True), grafted)
    eager = make_teacher(attn_implementation="eager")
    assert "mask" in obstacle(plain, graft(eager, plan_surgery(eager, load_recipe("hedgehog").mixer)))


def test_streamed_layers_are_not_recorded(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    stream = stream_layers(model, torch.device("cpu"))
    grafted = graft(model, plan_surgery(model, load_recipe("hedgehog").mixer))
    assert "streamed" in obstacle(TransferConfig(tokens=1), Graft(grafted.model, grafted.students, stream=stream))


def test_on_a_cpu_graphs_are_no_question(tmp_path: Path, make_teacher: MakeTeacher) -> None:
    config, found = TransferConfig(**{**BUDGET, "tokens": 2 * 2 * ROWS * LENGTH}), []
    for graphs in (False, True):
        model = make_teacher()
        torch.manual_seed(1)
        found.append(
            train(
                tmp_path / str(graphs), graft(model, plan_surgery(model, load_recipe("hedgehog").mixer)), config, graphs
            )
        )
    assert found[0][1] == found[1][1]
