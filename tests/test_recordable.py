"""Which micro-batches can be recorded as CUDA graphs: those that ask nothing of the host."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_families import SPECIAL, VOCABULARY, tiny_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from linearize import graphs, packed
from linearize.graphs import obstacle
from linearize.packed import softmax_by_document, with_starts
from linearize.pipeline import _recordable
from linearize.recipe import load_recipe
from linearize.stages import Batch, StageConfig, build_stage
from linearize.stages.distil import DistilConfig
from linearize.stages.transfer import TransferConfig
from linearize.surgery import graft, plan_surgery

HOST = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "lift_fresh"}
"""Operations that would wait for the GPU, and the making of tensors of the host's numbers, which are copied to it."""


class HostReads(TorchDispatchMode):
    """Operations whose results the host looks at, and numbers it hands over: none of it can be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= HOST & {func._schema.name.removeprefix("aten::")}
        return func(*args, **(kwargs or {}))


def host_reads(
    stage_config: StageConfig, recipe: str, family: str, make: Callable[[Batch], Batch] | None = None, **sizes: Any
) -> tuple[str, set[str]]:
    """The obstacle to recording such a stage's micro-batches, and what in the third one could not be recorded."""
    teacher = tiny_teacher(family, **sizes)
    grafted = graft(teacher, plan_surgery(teacher, load_recipe(recipe).mixer, (1,) if make else "none"))
    stage = build_stage(stage_config, grafted)
    for parameter in stage.trainable().values():
        parameter.requires_grad_(True)
    place_BT = torch.arange(24).expand(2, -1)
    ids_BT = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    made = Batch(ids_BT, place_BT % 12, place_BT // 12, place_BT % 12 < 11)
    why = obstacle(stage_config, grafted)
    with softmax_by_document(grafted, "no") if make else nullcontext():
        made = make(made) if make else made
        for _ in range(graphs.RUNS_BEFORE):
            stage.train_micro_batch(made, lambda loss: loss.backward())
        with HostReads() as mode:
            stage.train_micro_batch(made, lambda loss: loss.backward())
    return why, mode.found


NOT_RECORDED = {"mixtral", "qwen3_moe", "qwen2", "qwen3", "gemma2", "gemma3_text"}
"""Experts, and layers that slide over a window."""

STAGES: dict[str, StageConfig] = {
    "transfer": TransferConfig(tokens=1),
    "hidden": TransferConfig(tokens=1, objective={"mse": 1.0, "hidden": 1.0}),
    "rows": TransferConfig(tokens=1, objective={"matrix": 1.0, "attention_ce": 1.0}),
    "distil": DistilConfig(tokens=1, kl=0.5, ce=0.5),
    "top_k": DistilConfig(tokens=1, top_k=5, train=("mixer",)),
}


@pytest.mark.parametrize("family", SPECIAL)
@pytest.mark.parametrize("stage", ["transfer", "distil"])
def test_what_is_recorded_asks_nothing_of_the_host(stage: str, family: str) -> None:
    why, found = host_reads(STAGES[stage], "hedgehog", family)
    assert why or not found
    assert bool(why) == (family in NOT_RECORDED)


@pytest.mark.parametrize("recipe", ["lawcat", "lizard", "lolcats", "gdn", "ahn", "mamba2-mimic", "mmmamba"])
@pytest.mark.parametrize("stage", ["hidden", "top_k"])
def test_mixers_ask_nothing_of_the_host(stage: str, recipe: str) -> None:
    assert host_reads(STAGES[stage], recipe, "llama") == ("", set())


@pytest.mark.parametrize("alone", [False, True], ids=["packed", "a document a row"])
@pytest.mark.parametrize("stage", ["transfer", "distil"])
@pytest.mark.parametrize("recipe", ["hedgehog", "lawcat", "lizard", "gdn", "ahn", "mamba2-mimic"])
def test_nor_does_softmax_that_is_told_documents(
    recipe: str, stage: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a softmax layer that the student keeps; where the kernel would be, a mask is made without the host too."""
    monkeypatch.setattr(packed, "_able", lambda *_: True)
    monkeypatch.setattr(packed, "SHORTEST", 0)

    def make(batch: Batch) -> Batch:
        return with_starts(replace(batch, segments_BT=None) if alone else batch)

    assert host_reads(STAGES[stage], recipe, "llama", make) == ("", set())


def test_rows_that_are_formed_again_ask_nothing_of_the_host() -> None:
    assert host_reads(STAGES["rows"], "hedgehog", "llama") == ("", set())


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 256},
    "dynamic": {"factor": 2.0},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 256, "short_factor": [1.0] * 8}
    | {"long_factor": [2.0] * 8},
}


@pytest.mark.parametrize("kind", ROPES)
def test_angles_that_follow_the_positions_are_not_recorded(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    why, found = host_reads(STAGES["transfer"], "hedgehog", "llama", rope_parameters=rope)
    assert ("turn" in why) == (kind in graphs.WATCHING)
    assert why or not found


@pytest.mark.parametrize(
    ("split", "profile", "stage", "words"),
    [
        ("data", False, "transfer", ""),
        ("layers", False, "transfer", "other processes"),
        ("data", True, "transfer", "profile"),
        ("fsdp", True, "recomputed", "recomputed"),
    ],
)
def test_a_run_says_why_it_replays_nothing(split: str, profile: bool, stage: str, words: str) -> None:
    teacher, said = tiny_teacher("llama"), io.StringIO()
    recipe = load_recipe("hedgehog")
    grafted = graft(teacher, plan_surgery(teacher, recipe.mixer))
    stages = {"transfer": TransferConfig(tokens=1), "recomputed": DistilConfig(tokens=1, checkpoint_activations=True)}
    training: Any = SimpleNamespace(
        split=split,
        job=SimpleNamespace(profile=profile),
        machine=SimpleNamespace(device=torch.device("cuda")),
        console=Console(file=said, width=200),
    )
    chosen = recipe.model_copy(update={"stages": (stages[stage],)})
    assert _recordable(chosen, 0, grafted, training) is not bool(words)
    assert bool(said.getvalue()) is bool(words)
    assert words in said.getvalue()
