"""What tests/test_processes.py shows through gloo, on several GPUs through NCCL and torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import SETTINGS, TOLERANCE, assert_same_records

from linearize.checkpoint import load_latest

DEVICE = "cuda"
GPUS = min(torch.cuda.device_count(), 4) // 2 * 2
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]

ROOT = Path(__file__).parents[1]
ONE_ROW = ("stages.0.micro_batch=1", "stages.1.micro_batch=1")
"""A step's four rows are four micro-batches on any number of processes: the same numbers, added in another order."""

KILLED = 1
PROGRAM = """
import os, signal, sys
from linearize.cli import main
from linearize.stages.distil import Distil

train, calls = Distil.train_micro_batch, []

def acting(self, batch, backward):
    calls.append(batch)
    if "DIES" in os.environ and len(calls) == 2 and os.environ.get("RANK") == os.environ["DIES"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(self, batch, backward)

Distil.train_micro_batch = acting
sys.exit(main())
"""
"""The command line; the process of rank DIES is killed within the second micro-batch of its distillation."""


@pytest.fixture(scope="module")
def run(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """Convert the tiny teacher with so many processes."""
    program = tmp_path_factory.mktemp("program") / "program.py"
    program.write_text(PROGRAM)

    def convert(out: Path, processes: int, *options: str, dies: int | None = None) -> subprocess.CompletedProcess[str]:
        words = ["convert", "--model", str(teacher_folder), "--data", str(text_file), "--out", str(out)]
        words += ["--device", DEVICE, *options]
        words += [word for setting in (*SETTINGS, *ONE_ROW) for word in ("--set", setting)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
        surroundings |= {} if dies is None else {"DIES": str(dies)}
        command = [sys.executable, *(launch if processes > 1 else []), str(program), *words]
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=240)

    return convert


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "student"
    done = run(out, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_same(alone: Path, out: Path) -> None:
    """The same records, and tensors that differ by TOLERANCE of their norm.

    Not entry by entry: a sum of four gradients depends on their order, and AdamW takes whole steps where a gradient is
    nothing but rounding.
    """
    assert_same_records(alone, out)
    weights, others = (load_file(folder / "model.safetensors") for folder in (alone, out))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (others[name] - weight).norm() <= TOLERANCE * weight.norm(), name


@pytest.mark.parametrize(
    ("split", "processes"),
    sorted({("layers", 2), *((split, count) for split in ("data", "fsdp") for count in (2, GPUS))}),
)
def test_several_gpus_equal_one(run, alone, tmp_path, split, processes):
    done = run(tmp_path / "many", processes, "--split", split)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "many" / "run" / "run.json").read_text())
    assert (facts["processes"], facts["split"], facts["micro_batches"]) == (processes, split, [1, 1])
    assert_same(alone, tmp_path / "many")


@pytest.mark.parametrize("split", ["data", "fsdp"])
def test_a_killed_rank_ends_the_others_and_fewer_go_on(run, alone, tmp_path, split):
    out = tmp_path / "parts"
    done = run(out, GPUS, "--split", split, "--save-every", "0", dies=KILLED)
    assert done.returncode != 0
    state = load_latest(out / "run").state
    assert (state.stage_index, state.step) == (1, 1 if GPUS == 4 else 0), done.stderr[-3000:]
    done = run(out, GPUS // 2, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(alone, out)
