"""Steps that are timed are the steps that decode; every length leaves a row; crossings lie where lines cross."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from linearize.cli import app
from linearize.evals import speed as module
from linearize.evals.crossover import Crossover, crossover
from linearize.evals.records import SpeedRow, read_rows
from linearize.evals.speed import SpeedSettings, measure_speed
from linearize.evals.stepping import Step, read_context, rewind, roomy_cache, state_bytes
from linearize.export import export_student
from linearize.recipe import load_recipe
from linearize.surgery import graft, plan_surgery

MakeTeacher = Callable[..., PreTrainedModel]
MakeTokens = Callable[..., torch.Tensor]
LENGTH, STEPS = 21, 5


@torch.no_grad()
def greedy(model: PreTrainedModel, ids_BT: torch.Tensor) -> list[list[int]]:
    """The tokens after the context's last one is read a second time, with transformers' own growing cache."""
    cache, token, found = DynamicCache(), ids_BT[:, -1:], []
    model(ids_BT, past_key_values=cache, use_cache=True)
    for _ in range(STEPS):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        found.append(token[:, 0].tolist())
    return found


def stepped(model: PreTrainedModel, ids_BT: torch.Tensor, *, replayable: bool) -> list[list[int]]:
    cache = roomy_cache(model, LENGTH + STEPS)
    read_context(model, cache, ids_BT, piece=8)
    step, found = Step(model, cache, ids_BT[:, -1:], replayable=replayable), []
    for _ in range(STEPS):
        step()
        found.append(step.token_B1[:, 0].tolist())
    return found


@pytest.mark.parametrize("recipe", ["lizard", "gdn", "ahn", "mamba2-mimic", "lolcats"])
def test_a_step_that_a_graph_may_hold_decodes_like_any_other(make_teacher, make_tokens, recipe) -> None:
    """Its tensors stay in place: without a graph it must go on just as well."""
    model = make_teacher()
    graft(model, plan_surgery(model, load_recipe(recipe).mixer))
    ids_BT = make_tokens(2, LENGTH)
    assert stepped(model, ids_BT, replayable=True) == greedy(model, ids_BT)


@pytest.mark.parametrize("keep", [None, (0,)])
def test_keys_in_memory_taken_once_decode_like_a_growing_cache(make_teacher, make_tokens, keep) -> None:
    model = make_teacher()
    if keep is not None:
        graft(model, plan_surgery(model, load_recipe("hedgehog").mixer, keep))
    ids_BT = make_tokens(2, LENGTH)
    assert stepped(model, ids_BT, replayable=False) == greedy(model, ids_BT)


def test_a_rewound_cache_stands_where_it_stood(make_teacher, make_tokens) -> None:
    model = make_teacher()
    plan = plan_surgery(model, load_recipe("hedgehog").mixer, (1,))
    graft(model, plan)
    cache, ids_BT = roomy_cache(model, LENGTH + STEPS), make_tokens(2, LENGTH)
    read_context(model, cache, ids_BT)
    config, held = model.config, state_bytes(cache)
    keys_and_values = 2 * LENGTH * config.num_key_value_heads * config.head_dim * 4
    assert held == 2 * (keys_and_values + sum(swap.state_bytes for swap in plan))
    found = []
    for _ in range(2):
        with rewind(cache):
            step = Step(model, cache, ids_BT[:, -1:], replayable=False)
            step()
            step()
            found.append(step.token_B1.tolist())
    assert found[0] == found[1]
    assert state_bytes(cache) == held


@pytest.fixture(scope="module")
def folders(make_teacher, tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """A student and its teacher on disk."""
    student, teacher = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("teacher")
    model = make_teacher()
    model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    recipe = load_recipe("hedgehog")
    export_student(graft(model, plan_surgery(model, recipe.mixer)), tokenizer, recipe, student)
    return student, teacher


def test_every_length_leaves_a_row_and_what_does_not_fit_says_so(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = folders
    whole = module.TASKS["prefill"]

    def too_long(subject: module.TimedModel, ids_BT: torch.Tensor, count: int) -> Any:
        if subject.name == "teacher" and ids_BT.shape[1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(subject, ids_BT, count)

    monkeypatch.setitem(module.TASKS, "prefill", too_long)
    said: list[str] = []
    settings = SpeedSettings(lengths=(16, 32), batch=2, decode=3, repeats=2)
    rows = measure_speed(student, settings, str(teacher), "cpu", said.append)
    found = read_rows(student, "speed")
    assert found is not None
    assert found[0] == rows
    assert "--lengths 16,32 --batch 2" in found[1].command
    assert [(row.model, row.length, row.mode) for row in rows] == [
        (model, length, mode)
        for model in ("student", "teacher")
        for length in (16, 32)
        for mode in ("prefill", "decode")
    ]
    (lost,) = [row for row in rows if row.out_of_memory]
    assert (lost.model, lost.mode, lost.length, lost.seconds) == ("teacher", "prefill", 32, None)
    assert any("out of memory" in text for text in said)
    kept = [row for row in rows if not row.out_of_memory]
    assert all(row.seconds and row.tokens_per_second and row.attention and not row.cuda_graph for row in kept)
    states = {(row.model, row.length): row.state_bytes for row in kept if row.mode == "decode"}
    assert states["student", 16] == states["student", 32]
    assert states["teacher", 32] == 2 * (states["teacher", 16] or 0)


def test_the_fastest_kernel_counts_and_one_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[str] = []

    @contextmanager
    def chosen(kernel: str | None) -> Iterator[None]:
        now.append(str(kernel))
        yield

    def run(count: int) -> list[float]:
        if now[-1] == "flash":
            raise RuntimeError("No available kernel. Aborting execution.\nmore")
        return [{"cuDNN": 2.0, "memory-efficient": 1.0}[now[-1]]] * count

    monkeypatch.setattr(module, "_with_kernel", chosen)
    expected = ("memory-efficient", "flash refused: No available kernel. Aborting execution.")
    assert module._fastest_kernel(run, 3) == expected


def test_what_fits_with_no_kernel_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(count: int) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_with_kernel", lambda kernel: nullcontext())
    with pytest.raises(torch.OutOfMemoryError):
        module._fastest_kernel(run, 3)


def test_the_command_prints_a_table(folders: tuple[Path, Path]) -> None:
    from typer.testing import CliRunner

    student, teacher = folders
    options = ["--lengths", "8,16", "--decode", "2", "--repeats", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["speed", str(student), "--teacher", str(teacher), *options])
    assert result.exit_code == 0, result.output
    assert "Time to first token: " in result.output
    assert "Decoding state: " in result.output


def speeds(student: dict[int, float], teacher: dict[int, float]) -> list[SpeedRow]:
    common = {"mode": "decode", "batch": 1, "peak_memory_bytes": None, "state_bytes": None, "dtype": "float32"}
    return [
        SpeedRow(
            **common,
            model=model,
            length=length,
            seconds=value or None,
            tokens_per_second=None,
            attention="sdpa",
            cuda_graph=False,
            out_of_memory=not value,
        )
        for model, costs in (("student", student), ("teacher", teacher))
        for length, value in costs.items()
    ]


@pytest.mark.parametrize(
    "student, teacher, expected",
    [
        ({1000: 2.0, 4000: 2.0}, {1000: 1.0, 4000: 4.0}, Crossover(2000.0, None)),
        ({1000: 1.0, 4000: 1.0}, {1000: 2.0, 4000: 3.0}, Crossover(None, "student")),
        ({1000: 1.0, 4000: 5.0}, {1000: 2.0, 4000: 4.0}, Crossover(None, "teacher")),
        # below at first, above in the middle: only where it stays below counts
        ({10: 1.0, 100: 4.0, 1000: 1.0}, {10: 2.0, 100: 2.0, 1000: 2.0}, Crossover(316.2278, None)),
        ({1000: 2.0, 4000: 0}, {1000: 1.0, 4000: 4.0}, None),  # out of memory: one length is no line
    ],
)
def test_a_crossing_is_where_the_lines_cross(student, teacher, expected) -> None:
    found = crossover(speeds(student, teacher), "decode", "seconds")
    assert found is None or found.always == expected.always
    assert (found and found.length) == (expected and expected.length and pytest.approx(expected.length))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["lizard", "gdn", "ahn", "mamba2-mimic", "lolcats", "swa-sink"])
def test_a_graph_decodes_what_the_step_decodes(make_teacher, make_tokens, recipe) -> None:
    from linearize.evals.stepping import WARM_STEPS, captured

    model = make_teacher()
    graft(model, plan_surgery(model, load_recipe(recipe).mixer))
    model.cuda()
    ids_BT = make_tokens(2, LENGTH).cuda()
    expected = stepped(model, ids_BT, replayable=True)
    cache = roomy_cache(model, LENGTH + STEPS)
    read_context(model, cache, ids_BT, piece=8)
    step = Step(model, cache, ids_BT[:, -1:], replayable=True)
    graph = captured(step)  # warm steps have run, the captured one has not
    found = []
    for _ in range(STEPS - WARM_STEPS):
        graph.replay()
        found.append(step.token_B1[:, 0].tolist())
    assert found == expected[WARM_STEPS:]
