"""Several processes give the losses and weights of one, however they share the work, and go on as another number.

The children are forks of the test process: they join through gloo on the CPU as torchrun's workers would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from linearize import measuring
from linearize.checkpoint import load_latest, read_trainer
from linearize.distributed import ALONE, Processes, add_up, choose_split, share_of_layers, shared_micro_batch
from linearize.errors import DataError, MainFailed, OtherFailed, RunError, RunInterrupted
from linearize.job import Conversion
from linearize.metrics import TIMING_FIELDS, read_metrics
from linearize.pipeline import convert
from linearize.recipe import load_recipe
from linearize.relay import Relay
from linearize.stages.distil import Distil
from linearize.stages.transfer import Transfer, TransferConfig
from linearize.surgery import graft, plan_surgery

QUIET = Console(quiet=True)
TOLERANCE = 2e-5
"""Relative, of losses and norms over the whole run: fp32 sums in another order, carried through AdamW."""

SETTINGS = (
    *(f"stages.{stage}.{setting}" for stage in (0, 1) for setting in ("length=32", "batch=4", "micro_batch=2")),
    "stages.0.tokens=640",
    "stages.1.tokens=640",
    "stages.1.lora.dropout=0.1",
    "heldout_tokens=128",
    "precision=fp32",
)


def together(count: int, action: Callable[[int], None]) -> list[int]:
    """Run `action(rank)` in that many processes that know of each other; their exit codes.

    They meet in a store of this process, as torchrun's workers do in their agent's. It binds a free port at once: one
    that was only looked up, for a child to bind later, could be another's by then.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                where = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": store.port,
                    "TORCHELASTIC_USE_AGENT_STORE": True,
                    "WORLD_SIZE": count,
                    "LOCAL_WORLD_SIZE": count,
                }
                os.environ.update(
                    {name: str(value) for name, value in (where | {"RANK": rank, "LOCAL_RANK": rank}).items()}
                )
                AcceleratorState._reset_state(reset_partial_state=True)  # of tests that ran in this process before
                torch.set_num_threads(1)  # a fork's thread pool is broken; threads that load weights race to renew it
                action(rank)
                code = 0
            except (RunInterrupted, MainFailed):
                code = 3
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture
def job(teacher_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., Conversion]:
    def make(out: str, **options) -> Conversion:
        return Conversion(
            str(teacher_folder),
            out=tmp_path / out,
            data=str(text_file),
            overrides=(*SETTINGS, *options.pop("overrides", ())),
            device="cpu",
            **options,
        )

    return make


@pytest.fixture(scope="module")
def alone(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "student"
    convert(Conversion(str(teacher_folder), out=out, data=str(text_file), overrides=SETTINGS, device="cpu"), QUIET)
    return out


def assert_same(alone: Path, out: str | Path) -> None:
    """Records with the same numbers, the same measurements, the same weights: to TOLERANCE."""
    assert_same_records(alone, out)
    one, many = (json.loads((Path(folder) / "metrics.json").read_text()) for folder in (alone, out))
    assert many["samples"] == one["samples"]
    assert many["untrained"] == pytest.approx(one["untrained"], rel=TOLERANCE)
    for left, right in zip(one["perplexity"], many["perplexity"], strict=True):
        for model in ("teacher", "student"):
            assert right[model] == pytest.approx(left[model], rel=TOLERANCE)
    weights, others = (load_file(Path(folder) / "model.safetensors") for folder in (alone, out))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=2e-6, msg=name)


def assert_same_records(alone: Path, out: str | Path) -> None:
    one, many = (read_metrics(Path(folder) / "run" / "metrics.jsonl") for folder in (alone, out))
    assert [record["step"] for record in many] == [record["step"] for record in one] == [1, 2, 3, 4, 5] * 2
    for left, right in zip(one, many, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {*TIMING_FIELDS, "name"}:
            assert right[name] == pytest.approx(left[name], rel=TOLERANCE, abs=1e-9), (left["step"], name)
    states = [read_trainer(load_latest(Path(folder) / "run")) for folder in (alone, out)]
    assert sorted(states[0]["names"]) == sorted(states[1]["names"])


@pytest.mark.parametrize("split", ["data", "layers", "fsdp"])
def test_two_processes_equal_one(job, alone, split):
    sharded = []

    def run(rank: int) -> None:
        train = Distil.train_micro_batch

        def watching(stage, batch, backward):
            names = [name for name, p in stage.graft.model.named_parameters() if isinstance(p, DTensor)]
            sharded[:] = names
            return train(stage, batch, backward)

        Distil.train_micro_batch = watching  # type: ignore[method-assign]  # in this fork alone
        result = convert(job("many", split=split), QUIET)
        assert result.folder == job("many").out
        layers = {name.split(".")[2] for name in sharded}
        assert layers == ({"0", "1", "2"} if split == "fsdp" else set())
        assert not [name for name in sharded if "mixer" in name or "lora" in name or "embed" in name]

    assert together(2, run) == [0, 0]
    assert_same(alone, job("many").out)
    facts = json.loads((Path(job("many").out) / "run" / "run.json").read_text())
    assert (facts["processes"], facts["split"], facts["micro_batches"]) == (2, split, [2, 2])


@pytest.mark.parametrize("split", ["data", "layers"])
def test_two_processes_that_stream_layers_equal_one(job, alone, split):
    def run(rank: int) -> None:
        convert(job("many", split=split, stream_layers=True), QUIET)

    assert together(2, run) == [0, 0]
    assert_same(alone, job("many").out)


def stopping(stage: type, call: int, rank: int, number: signal.Signals) -> None:
    """In this process, send a signal within a micro-batch of the stage."""
    train, calls = stage.train_micro_batch, []  # type: ignore[attr-defined]

    def acting(self, batch, backward):
        calls.append(batch)
        if len(calls) == call and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
        return train(self, batch, backward)

    stage.train_micro_batch = acting  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("split", "stage", "rank"),
    [("layers", Transfer, 1), ("layers", Distil, 0), ("data", Transfer, 0), ("fsdp", Distil, 1)],
)
def test_two_processes_stop_together_and_one_goes_on(job, alone, split, stage, rank):
    def run(own: int) -> None:
        stopping(stage, 3, rank, signal.SIGTERM)
        convert(job("parts", split=split), QUIET)

    assert together(2, run) == [3, 3]
    convert(job("parts", resume=True), QUIET)
    assert_same(alone, job("parts").out)


@pytest.mark.parametrize("split", ["layers", "fsdp"])
def test_one_process_stops_and_two_go_on(job, alone, split):
    def begin(own: int) -> None:
        stopping(Transfer, 5, 0, signal.SIGTERM)
        convert(job("parts"), QUIET)

    def go_on(own: int) -> None:
        convert(job("parts", resume=True, split=split), QUIET)

    assert together(1, begin) == [3]
    assert together(2, go_on) == [0, 0]
    assert_same(alone, job("parts").out)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(job, alone):
    def run(own: int) -> None:
        stopping(Distil, 2, 1, signal.SIGKILL)
        convert(job("parts", save_every=0.0), QUIET)

    codes = together(2, run)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 3)
    convert(job("parts", resume=True), QUIET)
    assert_same(alone, job("parts").out)


def test_a_fault_of_the_main_process_is_told_to_all(job):
    Path(job("taken").out).mkdir()
    (Path(job("taken").out) / "thesis.tex").write_text("precious")

    def run(rank: int) -> None:
        with pytest.raises(RunError, match="exists already") as error:
            convert(job("taken"), QUIET)
        assert isinstance(error.value, MainFailed) == (rank == 1)

    assert together(2, run) == [0, 0]


@pytest.mark.parametrize("split", ["data", "fsdp"])
def test_a_process_that_fails_as_all_measure_ends_them_and_the_run_goes_on(job, alone, split, monkeypatch, capfd):
    """By data they agree; FSDP2 has the other one wait for a gather, where a thread ends it."""
    monkeypatch.setattr("linearize.faults.GRACE", 1.0)
    measured, calls = measuring.measure_in_training, []

    def failing(*model_and_text):
        calls.append(model_and_text)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory.\nAnd more.")
        return measured(*model_and_text)

    def run(rank: int) -> None:
        measuring.measure_in_training = failing  # in this fork alone
        with pytest.raises(RunError) as error:
            convert(job("parts", split=split), QUIET)
        assert isinstance(error.value, OtherFailed) == (rank == 0)
        sys.stderr.write(f"error {error.value}\n")

    assert together(2, run) == ([0, 0] if split == "data" else [2, 0])
    said = "error process 1 failed: OutOfMemoryError: CUDA out of memory. What was saved is whole: go on with the same"
    assert capfd.readouterr().err.count(said) == 2
    convert(job("parts", resume=True), QUIET)
    assert_same(alone, job("parts").out)


def test_a_process_that_fails_as_it_trains_ends_who_waits_for_its_layers(job, monkeypatch, capfd):
    monkeypatch.setattr("linearize.faults.GRACE", 1.0)

    def failing(stage, batch, backward):
        raise DataError("is no number", place="row 7")

    def run(rank: int) -> None:
        if rank == 0:
            Transfer.train_micro_batch = failing  # type: ignore[method-assign]
        with pytest.raises(DataError, match="row 7"):
            convert(job("parts", split="layers"), QUIET)

    assert together(2, run) == [0, 2]
    assert "error process 0 failed: row 7: is no number" in capfd.readouterr().err


def test_gradients_are_added_up_in_buckets(monkeypatch):
    monkeypatch.setattr("linearize.distributed.BUCKET", 10)

    def run(rank: int) -> None:
        dist.init_process_group("gloo")
        tensors = [
            torch.full(shape, float(rank + 1), dtype=dtype)
            for shape in [(3,), (2, 4), (30,)]
            for dtype in (torch.float32, torch.bfloat16)
        ]
        add_up(tensors)
        assert all((tensor == 3).all() for tensor in tensors)

    assert together(2, run) == [0, 0]


# --------------------------------------------------------------------------------------------------- refusals

TWO = Processes(0, 2)


def test_layers_are_shared_as_neighbours():
    assert share_of_layers([1, 2, 4, 5, 6], TWO, 0) == [(1, 2), (4, 5, 6)]
    with pytest.raises(RunError, match=r"stages\.0: 1 student layers cannot be split over 2 .*--split data"):
        share_of_layers([3], TWO, 0)


def test_rows_are_shared_evenly():
    config = TransferConfig(tokens=10**6, batch=12, micro_batch=6)
    assert [shared_micro_batch(config, count, 0) for count in (1, 2, 3, 4, 6, 12)] == [6, 6, 4, 3, 2, 1]
    with pytest.raises(RunError, match=r"12 rows cannot be shared by 24 .*Start 1, 2, 3, 4, 6, 12 processes"):
        shared_micro_batch(config, 24, 0)


def test_splits_that_cannot_be():
    recipe = load_recipe("hedgehog")
    with pytest.raises(RunError, match="'rows' is no way to split"):
        choose_split("rows", recipe.stages, TWO)
    with pytest.raises(RunError, match="'layers' needs more than one process"):
        choose_split("layers", recipe.stages, ALONE)
    trains = load_recipe("hedgehog", ["stages.1.train=[all]", "stages.1.lora=null"])
    with pytest.raises(RunError, match=r"stages\.1 trains some \(all\).*--split data"):
        choose_split("fsdp", trains.stages, TWO)
    assert choose_split(None, recipe.stages, ALONE) == "data"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_takes_the_launch_files(job, alone, name):
    root = Path(__file__).parents[1]
    options = replace(job("launched"), split=None)
    words = ["--model", options.model, "--data", str(options.data), "--out", str(options.out), "--device", "cpu"]
    words += [word for setting in options.overrides for word in ("--set", setting)]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(root / "configs" / "launch" / f"{name}.yaml")]
    launch += [
        "--num_processes",
        "2",
        "--main_process_port",
        "0",  # a free one
        "-m",
        "linearize.cli",
        "convert",
    ]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run(
        [sys.executable, *launch, *words], env=os.environ | {"PYTHONPATH": paths}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    facts = json.loads((Path(options.out) / "run" / "run.json").read_text())
    assert (facts["processes"], facts["split"]) == (2, {"ddp": "data", "fsdp2": "fsdp"}[name])
    assert_same(alone, options.out)


def test_every_layer_runs_on_one_process_and_trains_as_if_alone(make_teacher, packed_batch):
    """Three processes, so that the one in the middle receives and hands on."""

    def build() -> tuple[Transfer, list[int]]:
        model, ran = make_teacher().requires_grad_(False), []
        torch.manual_seed(0)
        stage = Transfer(TransferConfig(tokens=1), graft(model, plan_surgery(model, load_recipe("hedgehog").mixer)))
        for parameter in stage.trainable().values():
            parameter.requires_grad_(True)
        for number, layer in enumerate(stage.graft.decoder_layers):
            layer.get_submodule("mlp").register_forward_hook(lambda *_, number=number: ran.append(number))
        return stage, ran

    def run(rank: int) -> None:
        dist.init_process_group("gloo")
        alone, _ = build()
        expected = alone.train_micro_batch(packed_batch, lambda loss: loss.backward())
        stage, ran = build()
        parts = share_of_layers([0, 1, 2], Processes(rank, 3), 0)
        relay = Relay(parts, Processes(rank, 3), step=1)
        stage.take_layers(parts[rank], relay.own_layers)
        found = stage.train_micro_batch(packed_batch, lambda loss: loss.backward())
        assert ran == [rank]
        assert torch.equal(found[f"error/layer_0{rank}"], expected[f"error/layer_0{rank}"])
        loss = found["loss"].clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, expected["loss"])
        gradients = alone.by_layer()[rank]
        for layer, parameters in stage.by_layer().items():
            for name, parameter in parameters.items():
                if layer == rank:
                    assert torch.equal(parameter.grad, gradients[name].grad), name
                else:
                    assert parameter.grad is None
        assert not any("forward" in vars(layer) for layer in stage.graft.decoder_layers)
        stage.train_micro_batch(packed_batch, lambda loss: None)
        assert len(relay._sent) == (rank < 2)  # that of the step before is gone
        dist.barrier()  # as at the end of every step: a process that left took with it what it had yet to send

    assert together(3, run) == [0, 0, 0]
