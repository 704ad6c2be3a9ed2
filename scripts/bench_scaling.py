"""Measure how training scales over processes: transfer (rows, layers) and distil (replicas, FSDP2).

    python scripts/bench_scaling.py --shape tiny --processes 1,2,4 --device cpu --out scaling.json
    python scripts/bench_scaling.py --shape llama-8b --processes 1,2,4,8 --out scaling.json

Weights are random, in the shape of a known model; rows are random tokens. For each number of processes, one process a
GPU (or gloo on the CPU), every way of sharing the work trains a few steps twice: strong scaling (a step has as many
rows as on one process) and weak scaling (as many rows a process). Printed, and with versions written to JSON:

    tokens/s     median over the steps, of the whole run, after those that compile kernels or record a CUDA graph
    efficiency   tokens/s over N times those of one process that trains the same (strong: rows a step, weak: a process)
    memory       peak of each process; on a CPU the resident set, which only grows from one measurement to the next
    exchanging   share of the main process's time in collectives, waiting for others included; on GPUs only, and not
                 by layers, where hidden states travel beside the work and wait for the receiver
    loss         largest relative difference from the losses of one process, strong scaling only

What --out has already, measured with the same settings on the same device, is not measured again, number of
processes by number of processes: an interrupted series goes on.

NVLink multicast stays off (NCCL_NVLS_ENABLE=0).

With --predict nothing is measured: printed is what `linearize plan --predict` says of each process's peak memory, and
that and the copy of the student's first weights that this script keeps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.distributed import Processes, Split, start_processes
from linearize.graphs import RUNS_BEFORE, obstacle
from linearize.machine import versions
from linearize.memory import Target, predict_memory
from linearize.metrics import MetricsLog, Progress, peak_memory_bytes, read_metrics
from linearize.packed import softmax_by_document
from linearize.recipe import load_recipe
from linearize.run_folder import write_json
from linearize.runs import FitSettings, Run
from linearize.sharding import shard_layers
from linearize.stages import Batch, StageConfig, build_stage, student_parameters
from linearize.surgery import Graft, graft, plan_surgery
from linearize.train import fit

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "llama-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
}

WAYS: tuple[tuple[str, Split], ...] = (
    ("transfer", "data"),
    ("transfer", "layers"),
    ("distil", "data"),
    ("distil", "fsdp"),  # last: sharding cannot be undone
)
ALONE: Split = "data"
"""What one process does, against which every way is measured."""

START: dict[str, torch.Tensor] = {}
"""The student's weights before their first step, in this process."""

PROFILED = 2
EXCHANGES = ("all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter", "reducescatter", "sendrecv")


@dataclass(frozen=True)
class Measured:
    """One way of sharing the work, on one number of processes."""

    stage: str
    split: str
    scaling: str
    processes: int
    rows: int
    tokens_per_second: float | None
    memory_bytes: list[int]
    exchanging: float | None
    losses: list[float]
    seconds: list[float]


class RandomRows:
    """Micro-batches of random tokens, by number."""

    def __init__(self, config: StageConfig, vocabulary: int) -> None:
        self._config, self._vocabulary = config, vocabulary

    def __len__(self) -> int:
        return self._config.steps * self._config.accumulation

    def __getitem__(self, index: int, /) -> Batch:
        shape = (min(self._config.micro_batch, self._config.batch), self._config.length)
        ids_BT = torch.randint(self._vocabulary, shape, generator=torch.Generator().manual_seed(index))
        targets_BT = torch.ones(shape, dtype=torch.bool)
        targets_BT[:, -1] = False
        return Batch(ids_BT, torch.arange(shape[1]).expand(shape), None, targets_BT)


def build(options: argparse.Namespace, device: torch.device) -> Graft:
    """The shape's model with random weights, the same on every process, and the recipe's mixers."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape], max_position_embeddings=options.length))
    torch.set_default_dtype(before)
    model = model.requires_grad_(False).eval()
    return graft(model, plan_surgery(model, load_recipe(options.recipe).mixer))


def stage_config(options: argparse.Namespace, stage: str, rows: int, steps: int) -> StageConfig:
    """The recipe's first stage of that kind, for so many steps of so many rows."""
    config = next(config for config in load_recipe(options.recipe).stages if config.kind == stage)
    size: dict[str, Any] = {"length": options.length, "batch": rows, "micro_batch": options.micro_batch}
    if options.recompute and stage == "distil":
        size["checkpoint_activations"] = True
    return config.model_copy(update=size | {"tokens": steps * rows * options.length})


def train(grafted: Graft, config: StageConfig, processes: Processes, split: Split) -> tuple[list[float], list[float]]:
    """Train; the seconds and the losses of every step."""
    grafted.model.requires_grad_(False)
    torch.manual_seed(0)
    stage = build_stage(config, grafted)
    with torch.no_grad():  # every measurement starts from the same student
        for name, parameter in student_parameters(grafted, [stage]).items():
            parameter.copy_(START.setdefault(name, parameter.detach().clone()))
    with tempfile.TemporaryDirectory() as folder, MetricsLog(Path(folder) / "metrics.jsonl") as metrics:
        run = Run(
            out=Path(folder),
            stage_index=0,
            student=student_parameters(grafted, [stage]),
            checkpoint=None,
            metrics=metrics,
            progress=Progress(Console(quiet=True)),
            seed=0,
            recipe_hash="",
            corpus_fingerprint="",
            processes=processes,
            split=split,
        )
        precision: Literal["no", "bf16"] = "bf16" if grafted.model.device.type == "cuda" else "no"
        rows, graphs = RandomRows(config, grafted.model.config.vocab_size), not obstacle(config, grafted)
        with softmax_by_document(grafted, precision) as by_document:
            fit(stage, rows, run, FitSettings(precision, None, 1e9, graphs=graphs, by_document=by_document))
        records = read_metrics(metrics.path)
    return [record["seconds"] for record in records], [record["loss"] for record in records]


def speed(config: StageConfig, seconds: list[float], processes: int, split: Split) -> float | None:
    """Tokens per second of the steps after those that record a CUDA graph; None where there are no others."""
    sharing = 1 if split == "layers" else processes
    own = config.accumulation // sharing
    counted = seconds[math.ceil((RUNS_BEFORE + 1) / own) :]
    return config.batch * config.length / statistics.median(counted) if counted else None


def exchanging(grafted: Graft, config: StageConfig, processes: Processes, split: Split) -> float | None:
    """Share of the steps' time in NCCL's kernels, on the main process; None on a CPU, where gloo's threads hide it, for
    one process, and by layers.
    """
    if grafted.model.device.type != "cuda" or processes.count == 1 or split == "layers":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds, _ = train(grafted, config, processes, split)
    total = 0.0
    for event in seen.key_averages():
        name = event.key.lower()
        if name.startswith("nccldev") and any(word in name for word in EXCHANGES):
            total += event.self_device_time_total
    return total / 1e6 / sum(seconds) if processes.main else 0.0  # who alone writes metrics.jsonl


def asked(options: argparse.Namespace, processes: int) -> list[tuple[str, Split, str]]:
    """Stage, split and scaling of each measurement on so many processes."""
    ways = WAYS if options.way is None else [way for way in WAYS if "-".join(way) in options.way]
    if processes == 1:
        ways = [(stage, ALONE) for stage in dict(ways)]
    scalings = ("strong", "weak") if options.scaling is None else (options.scaling,)
    return [(stage, split, scaling) for stage, split in ways for scaling in scalings]


def work(options: argparse.Namespace) -> None:
    """What one process does; the main one prints the measurements as JSON, a line each."""
    began = time.monotonic()

    def say(words: str) -> None:
        if processes.main:
            print(
                f"[{processes.count} processes, {time.monotonic() - began:.0f} s] {words}", file=sys.stderr, flush=True
            )

    processes = start_processes(options.device)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    grafted, sharded = build(options, device), False
    say("model built")
    for stage, split, scaling in asked(options, processes.count):
        if split == "fsdp" and not sharded:
            shard_layers(grafted.model, device, processes)
            sharded = True
        rows = options.rows if scaling == "strong" else options.rows_each * processes.count
        config = stage_config(options, stage, rows, options.steps)
        seconds, losses = train(grafted, config, processes, split)
        memory = processes.gather(peak_memory_bytes(device))
        share = exchanging(grafted, stage_config(options, stage, rows, PROFILED), processes, split)
        per_second = speed(config, seconds, processes.count, split)
        found = Measured(stage, split, scaling, processes.count, rows, per_second, memory, share, losses, seconds)
        say(f"{stage} by {split}, {scaling}: {per_second or math.nan:,.0f} tokens/s")
        if processes.main:
            print(json.dumps(asdict(found)), flush=True)


def launch(count: int) -> Iterator[Measured]:
    """Start that many processes; what the main one measures, as it comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(count):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        surroundings = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1", **os.environ, **own}
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        children.append(subprocess.Popen(command, env=surroundings, stdout=output, text=True))
    printed = children[0].stdout
    assert printed is not None
    yield from (Measured(**json.loads(line)) for line in printed if line.startswith("{"))
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"{count} processes: one failed")


def measured_before(out: Path | None, series: dict[str, Any]) -> list[Measured]:
    """What the file holds of the same series; none where there is no file.

    Raises:
        SystemExit: it holds another series, or something else.
    """
    if out is None or not out.is_file():
        return []
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
        rows = [Measured(**{name: row[name] for name in Measured.__dataclass_fields__}) for row in content["measured"]]
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{out} holds no measurements of this script: give another file") from None
    del content["measured"]
    if content != json.loads(json.dumps(series)):
        raise SystemExit(f"{out} holds measurements of other settings, versions, code or devices: give another file")
    return rows


def sources() -> str:
    """A digest of the code that is measured: what was changed in between does not belong into one series."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in (root / "linearize", root / "kernels", root / "recipes"):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compare(found: list[Measured]) -> list[dict[str, Any]]:
    """Each measurement with its efficiency, and the difference of its losses, against one process."""
    alone = {(one.stage, one.scaling): one for one in found if one.processes == 1}
    rows = []
    for one in found:
        base = alone.get((one.stage, one.scaling))
        row = asdict(one) | {"efficiency": None, "loss_difference": None}
        if base is not None and one.tokens_per_second and base.tokens_per_second:
            row["efficiency"] = one.tokens_per_second / (one.processes * base.tokens_per_second)
        if base is not None and base.rows == one.rows:
            pairs = zip(one.losses, base.losses, strict=True)
            row["loss_difference"] = max(abs(loss - expected) / abs(expected) for loss, expected in pairs)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title)
    for heading in ("stage", "split", "scaling", "N", "rows", "tokens/s", "efficiency", "memory", "exchanging", "loss"):
        shown.add_column(heading, justify="left" if heading in ("stage", "split", "scaling") else "right")
    for row in rows:
        efficiency, difference = row["efficiency"], row["loss_difference"]
        shown.add_row(
            row["stage"],
            row["split"],
            row["scaling"],
            str(row["processes"]),
            str(row["rows"]),
            "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
            "" if efficiency is None else f"{efficiency:.0%}",
            f"{max(row['memory_bytes']) / 1e9:.2f} GB",
            "" if row["exchanging"] is None else f"{row['exchanging']:.0%}",
            "" if difference is None else f"{difference:.0e}",
        )
    return shown


def predict(options: argparse.Namespace) -> Table:
    """Peaks of all that would be measured."""
    shown = Table(title=f"{options.shape}, T={options.length}, {options.recipe}: peaks predicted, GB")
    for heading in ("stage", "split", "scaling", "N", "predicted", "and the first weights", "hidden states, at most"):
        shown.add_column(heading)
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=options.length)
    for count in map(int, options.processes.split(",")):
        for stage, split, scaling in asked(options, count):
            rows = options.rows if scaling == "strong" else options.rows_each * count
            only = (stage_config(options, stage, rows, options.steps),)
            recipe = load_recipe(options.recipe).model_copy(update={"stages": only})
            target = Target("cpu", "fp32") if options.device == "cpu" else Target()
            (found,) = predict_memory(config, recipe, replace(target, processes=count, split=split))
            first = found.terms["mixers"] + found.terms.get("adapters", 0)
            waiting = found.terms.get("hidden states not yet taken, at most", 0)
            sizes = (f"{size / 1e9:.2f}" for size in (found.peak, found.peak + first, waiting))
            shown.add_row(stage, split, scaling, str(count), *sizes)
    return shown


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--recipe", default="lizard", help="a recipe with a transfer and a distil stage")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="strong scaling: rows a step")
    parser.add_argument("--rows-each", type=int, default=2, help="weak scaling: rows a step and process")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scaling", choices=("strong", "weak"), default=None, help="only this one")
    parser.add_argument("--way", action="append", choices=["-".join(way) for way in WAYS], help="only these")
    parser.add_argument("--recompute", action="store_true", help="distil computes decoder layers again, to save memory")
    parser.add_argument("--predict", action="store_true", help="peak memory, without measuring")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    if options.predict:
        Console(width=140).print(predict(options))
        return
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU with {os.cpu_count()} cores"
    settings = {
        name: value for name, value in vars(options).items() if name not in ("worker", "out", "processes", "predict")
    }
    series = {"device": device, "settings": settings, "versions": versions(), "sources": sources()}
    found = measured_before(options.out, series)
    for count in map(int, options.processes.split(",")):
        before = [one for one in found if one.processes == count]
        if len(before) == len(asked(options, count)):
            continue
        found = [one for one in found if one not in before]
        for one in launch(count):
            found.append(one)
            if options.out is not None:  # after each: a later one may fail
                write_json(options.out, series | {"measured": compare(found)})
    title = f"{options.shape}, T={options.length}, {options.recipe}, {device}"
    Console(width=140).print(table(compare(found), title))


if __name__ == "__main__":
    main()
