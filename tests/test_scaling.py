"""The scripts that measure and plan scaling: what the plan says is exchanged is what processes exchange."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from test_processes import together
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.distributed import Processes
from linearize.sharding import shard_layers

ROWS, LENGTH, STEPS = 2, 32, 2
UNCOUNTED = ("recv_", "broadcast_", "allgather_", "gather_")
"""Of a step's report, on the CPU, and of weights before and after a stage; or the other end of what is counted."""


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Counted(TorchDispatchMode):
    """Bytes that one of two processes sends inside the block, as rings would; CPU backward passes are seen too."""

    SHARES = {"allreduce_": 1.0, "_allgather_base_": 0.5, "send": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._opname
            assert name in self.SHARES or name in UNCOUNTED, name
            if name in self.SHARES:
                first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
                self.bytes += self.SHARES[name] * first.numel() * first.element_size()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("stage", "split", "recomputed"),
    [
        ("transfer", "data", False),
        ("transfer", "layers", False),
        ("transfer", "fsdp", False),
        ("distil", "data", False),
        ("distil", "fsdp", False),
        ("distil", "fsdp", True),
    ],
)
def test_what_is_exchanged(stage, split, recomputed):
    bench, plan = script("bench_scaling"), script("plan_scaling")
    options = argparse.Namespace(shape="tiny", recipe="hedgehog", length=LENGTH, micro_batch=1, recompute=recomputed)

    def run(rank: int) -> None:
        dist.init_process_group("gloo")
        processes = Processes(rank, 2, dist.new_group(backend="gloo"))
        grafted = bench.build(options, torch.device("cpu"))
        if split == "fsdp":
            shard_layers(grafted.model, torch.device("cpu"), processes)
        config = bench.stage_config(options, stage, ROWS, STEPS)
        with Counted() as counted:
            _, losses = bench.train(grafted, config, processes, split)
        trained = [p for p in grafted.model.parameters() if p.requires_grad]
        moments = 2 * sum(p.numel() * p.element_size() for p in trained)
        shape = grafted.model.config
        layer = 4 * (plan.layer_weights(shape) + 2 * shape.hidden_size)
        work = plan.Work("tiny", shape, stage, 1.0, LENGTH, moments, 0, 0, layer, element=4)
        if rank == 0:  # with layers, the last process sends nothing on
            assert len(losses) == STEPS
            norm = 4 * STEPS if split == "layers" else 0
            expected = STEPS * plan.estimate(work, split, 2, 1).sent + norm
            assert counted.bytes == pytest.approx(expected)

    assert together(2, run) == [0, 0]


def test_steps_on_paper():
    """By hand: a step of 8 micro-batches on 8 GPUs."""
    plan = script("plan_scaling")
    config = plan.SHAPES["llama-8b"]
    work = plan.Work("llama-8b", config, "transfer", 1.0, 16384, 0, 100 * 2**30, 2**30, 10**9)
    assert plan.layer_weights(config) * 32 + 2 * 128256 * 4096 + 65 * 4096 == 8_030_261_248
    assert plan.estimate(work, "data", 8, 1).slowest == 1.0
    assert plan.estimate(work, "layers", 8, 1).fastest == pytest.approx((8 + 7) / 8)  # idle 7 of 15 turns
    sharded = plan.estimate(work, "fsdp", 8, 1)
    assert sharded.slowest - sharded.fastest == pytest.approx(7 / 8 * 32e9 / plan.INSIDE)
    assert sharded.memory == pytest.approx(100 * 2**30 - 28e9 + 3e9)
    assert plan.obstacle(work, "data", plan.estimate(work, "data", 8, 1), 8) == "does not fit"
    measured = {("llama-1b", "distil"): 1.0}
    longer = plan.seconds_of(measured, "llama-8b", "distil", 2048)
    ratio = plan.flops(config, "distil", 2048) / plan.flops(plan.SHAPES["llama-1b"], "distil", 2048)
    assert longer == ratio == pytest.approx(6.24, abs=0.01)
