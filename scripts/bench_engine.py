"""Speed and memory of training: the teacher's own forward, transfer and distil, with predicted and measured memory.

    python scripts/bench_engine.py --out engine.json
    python scripts/bench_engine.py --device cpu --shapes tiny --steps 3 --out engine.json

Models have random weights of known shapes, text is random tokens in documents of random lengths. Stages run in the
training loop itself (`fit`); the first `--warmup` steps do not count, speeds are of the median step. The ideal of
transfer is the teacher's forward; that of distil the same, and the student's forward and backward, without loss,
optimiser and loop. Rows are written as they come. A measured peak is what CUDA's allocator held at most; on a CPU, what
torch's allocator did, by its profiler, less the host's copy of streamed layers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from linearize.data import Corpus, PackedRows
from linearize.graphs import obstacle
from linearize.machine import DTYPES, Machine, choose_machine, versions
from linearize.memory import Target, predict_memory
from linearize.metrics import MetricsLog, Progress, read_metrics
from linearize.packed import softmax_by_document
from linearize.recipe import Recipe, load_recipe
from linearize.run_folder import write_json
from linearize.stages import Batch, Stage, build_stage, student_parameters
from linearize.stages.base import run_trunk, softmax_mask
from linearize.streaming import recompute, stream_layers
from linearize.surgery import Graft, graft, plan_surgery
from linearize.train import FitSettings, Run, fit

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A shape at a length, and how its layers are held."""

    shape: str
    length: int
    rows: int
    recomputed: bool = False
    streamed: bool = False

    def __str__(self) -> str:
        how = " streamed" * self.streamed + " recomputed" * (self.recomputed and not self.streamed)
        return f"{self.shape} T={self.length} B={self.rows}{how}"


CASES: dict[str, tuple[Case, ...]] = {
    "135m": (Case("135m", 1024, 8), Case("135m", 2048, 8)),
    "llama-1b": (Case("llama-1b", 2048, 8, recomputed=True),),
    "llama-8b": (Case("llama-8b", 2048, 8, recomputed=True), Case("llama-8b", 2048, 8, streamed=True)),
    "tiny": (
        Case("tiny", 128, 4), Case("tiny", 256, 4), Case("tiny", 128, 4, recomputed=True),
        Case("tiny", 128, 4, streamed=True),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    machine: Machine
    recipe: str
    steps: int
    warmup: int
    seconds: float
    compiled: bool
    graphs: bool
    masked: bool

    def recipe_for(self, case: Case) -> Recipe:
        """The recipe with the case's sizes: one micro-batch a step, as many tokens as the steps need."""
        recipe = load_recipe(self.recipe)
        sizes = {"length": case.length, "batch": case.rows, "micro_batch": case.rows}
        stages = []
        for stage in recipe.stages:
            more: dict[str, Any] = sizes | {"tokens": self.steps * case.rows * case.length}
            if stage.kind == "distil" and (case.recomputed or case.streamed):
                more["checkpoint_activations"] = True
            stages.append(stage.model_copy(update=more))
        return recipe.model_copy(update={"stages": tuple(stages), "precision": self.machine.precision})


def make_model(case: Case, settings: Settings) -> tuple[PreTrainedModel, LlamaConfig]:
    """A model of random weights; made on the device, brought to the host tensor by tensor where layers stream."""
    device, config = settings.machine.device, LlamaConfig(**SHAPES[case.shape], max_position_embeddings=8192)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[settings.machine.precision], attn_implementation="sdpa"
        )
    home = torch.device("cpu") if case.streamed else device
    model.to_empty(device=home)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        parameter.data.copy_(values.fill_(1.0) if "norm" in name else values.normal_(std=0.02))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(home)
    model.tie_weights()
    return model.eval().requires_grad_(False), config


def make_rows(case: Case, settings: Settings) -> PackedRows:
    """Documents of 16 to 2 T tokens, so that most rows have several."""
    tokens = settings.steps * case.rows * case.length
    random = np.random.default_rng(0)
    ends = np.cumsum(random.integers(16, 2 * case.length, tokens // 16))
    starts = np.concatenate([[0], ends[ends < tokens]]).astype(np.int64)
    ids = random.integers(0, SHAPES[case.shape]["vocab_size"], tokens).astype(np.int32)
    corpus = Corpus("random tokens", "random", ids, starts, 1.0, {})
    return PackedRows(corpus, length=case.length, rows=case.rows, first_token=0, tokens=tokens, seed=0)


def median_seconds(step: Callable[[], Any], settings: Settings) -> float:
    """Of one call, after warm-up, for as many calls as fit into the time, three at least."""
    device, times = settings.machine.device, []
    for _ in range(settings.warmup):
        step()
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < settings.seconds:
        wait(device)
        before = time.perf_counter()
        step()
        wait(device)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """The most bytes that torch's allocator of the device held inside the block."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.before = sum(
                {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in living_tensors()}.values()
            )
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self.profile.__exit__(*error)
        live = self.bytes = self.before
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.bytes = max(self.bytes, live)


def living_tensors() -> Iterator[Tensor]:
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            yield thing


def measure_teacher(model: PreTrainedModel, batch: Batch, settings: Settings) -> float:
    """Seconds of its forward without the head, before surgery: what it would take without us."""
    mask_B1TT = softmax_mask(model, batch)
    arguments = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    with torch.no_grad():
        return median_seconds(lambda: model.model(attention_mask=mask_B1TT, **arguments), settings)


def measure_student(grafted: Graft, stage: Stage, batch: Batch, recomputed: bool, settings: Settings) -> float:
    """Seconds of the student's forward and backward alone, recomputed as in the stage."""
    mask_B1TT = softmax_mask(grafted.model, batch)
    trained = list(stage.trainable().values())

    def step() -> None:
        with (
            torch.autocast(
                batch.input_ids_BT.device.type, torch.bfloat16, enabled=settings.machine.precision == "bf16"
            ),
            recompute(grafted.decoder_layers) if recomputed else nullcontext(),
        ):
            hidden_BTD = run_trunk(grafted.model, batch, mask_B1TT)
        hidden_BTD.float().sum().backward()
        for parameter in trained:
            parameter.grad = None

    for parameter in trained:
        parameter.requires_grad_(True)
    seconds = median_seconds(step, settings)
    grafted.model.requires_grad_(False)
    return seconds


def measure_stage(
    index: int, stages: list[Stage], grafted: Graft, rows: PackedRows, settings: Settings
) -> dict[str, Any]:
    """Train one stage in the loop itself; tokens a second of its median step, and its peak memory."""
    device, stage = settings.machine.device, stages[index]
    grafted.model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, MetricsLog(Path(folder) / "metrics.jsonl") as metrics:
        run = Run(
            out=Path(folder), stage_index=0, student=student_parameters(grafted, stages), checkpoint=None,
            metrics=metrics, progress=Progress(Console(quiet=True)), seed=0, recipe_hash="", corpus_fingerprint="",
        )  # fmt: skip
        with Peak(device) as peak:
            graphs, precision = (
                settings.graphs and not obstacle(stage.config, grafted),
                settings.machine.mixed_precision,
            )
            telling = nullcontext(False) if settings.masked else softmax_by_document(grafted, precision)
            with telling as by_document:
                fit(stage, rows, run, FitSettings(precision, None, 1e9, graphs=graphs, by_document=by_document))
        seconds = [record["seconds"] for record in read_metrics(metrics.path)][settings.warmup :]
    for parameter in stage.trainable().values():
        parameter.grad = None
    return {"seconds": statistics.median(seconds), "peak_bytes": peak.bytes}


def measure(case: Case, settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of one case."""
    tokens, recipe = case.rows * case.length, settings.recipe_for(case)
    model, config = make_model(case, settings)
    target = Target(settings.machine.device.type, settings.machine.precision, case.streamed)  # type: ignore[arg-type]
    predicted = predict_memory(config, recipe, target)
    stream = stream_layers(model, settings.machine.device) if case.streamed else None
    batches = make_rows(case, settings)
    batch = batches[0].to(settings.machine.device)
    with Peak(settings.machine.device) as peak:
        teacher = measure_teacher(model, batch, settings)
    common = {"case": str(case), "tokens": tokens}
    yield common | {"what": "teacher forward", "seconds": teacher, "peak_bytes": peak.bytes}
    grafted = replace(graft(model, plan_surgery(model, recipe.mixer, recipe.keep_softmax)), stream=stream)
    if settings.compiled:
        grafted.compile_mixers()
    stages: list[Stage] = []
    for index, stage_config in enumerate(recipe.stages):
        stages.append(build_stage(stage_config, grafted))
        ideal: float | None = teacher
        if stage_config.kind == "distil":  # streamed layers have no backward pass without being recomputed
            alone = None
            if not case.streamed:
                alone = measure_student(grafted, stages[index], batch, case.recomputed, settings)
            ideal = None if alone is None else teacher + alone
        found = measure_stage(index, stages, grafted, batches, settings)
        if stream is not None and settings.machine.device.type == "cpu":
            found["peak_bytes"] -= stream.host_bytes
        memory = predicted[index]
        yield common | found | {
            "what": stage_config.kind, "ideal_seconds": ideal,
            "share_of_ideal": None if ideal is None else ideal / found["seconds"],
            "predicted_bytes": memory.peak, "predicted_terms": memory.terms, "predicted_peak_in": memory.peak_in,
        }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown. The share is the teacher's seconds, or the ideal's, over the stage's."""
    lines = [
        "| case | what | tokens/s | ms | share of ideal | peak, GiB | predicted, GiB | predicted / measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak, predicted = row["peak_bytes"] / 2**30, row.get("predicted_bytes")
        share = "-" if row.get("share_of_ideal") is None else f"{row['share_of_ideal']:.2f}"
        guess = (
            ["-", "-"] if predicted is None else [f"{predicted / 2**30:.3f}", f"{predicted / row['peak_bytes']:.3f}"]
        )
        cells = [
            row["case"],
            row["what"],
            f"{row['tokens'] / row['seconds']:,.0f}",
            f"{1000 * row['seconds']:.1f}",
            share,
        ]
        lines.append("| " + " | ".join([*cells, f"{peak:.3f}", *guess]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure case by case; a case that fails is a row with its error, and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cpu or cuda; default: a GPU where there is one")
    parser.add_argument("--shapes", default="135m,llama-1b,llama-8b", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--recipe", default="hedgehog")
    parser.add_argument("--rows", type=int, default=None, help="rows of a micro-batch, instead of each case's own")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each stage")
    parser.add_argument("--warmup", type=int, default=3, help="steps and calls that do not count")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each forward that is measured by itself")
    parser.add_argument("--compile", action="store_true", help="compile the mixers")
    parser.add_argument("--no-graphs", action="store_true", help="launch micro-batches, do not replay CUDA graphs")
    parser.add_argument("--masked", action="store_true", help="softmax layers get masks of packed rows, on GPUs too")
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after every row")
    asked = parser.parse_args()
    if asked.steps <= asked.warmup:
        parser.error("--steps must be more than --warmup")
    machine = choose_machine(asked.device, "auto")
    settings = Settings(
        machine,
        asked.recipe,
        asked.steps,
        asked.warmup,
        asked.seconds,
        asked.compile,
        not asked.no_graphs,
        asked.masked,
    )
    facts = {"device": machine.name, "precision": machine.precision, "date": datetime.now(UTC).isoformat(),
             "versions": versions(), "command": " ".join(sys.argv), "recipe": asked.recipe}  # fmt: skip
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for case in (case for shape in asked.shapes.split(",") for case in CASES[shape]):
        case = case if asked.rows is None else replace(case, rows=asked.rows)
        try:
            for row in measure(case, settings):
                rows.append(row)
                write_json(asked.out, {"facts": facts, "rows": rows, "failed": failed})
                print(json.dumps({key: row[key] for key in ("case", "what", "seconds", "peak_bytes")}), flush=True)
        except (RuntimeError, ValueError) as error:  # out of memory among them: the next case may fit
            failed.append({"case": asdict(case), "error": f"{type(error).__name__}: {str(error)[:500]}"})
            print(json.dumps(failed[-1]), flush=True)
        gc.collect()
    write_json(asked.out, {"facts": facts, "rows": rows, "failed": failed})
    print(f"\n{machine.name}, {machine.precision}, {facts['date'][:10]}, recipe {asked.recipe}\n\n{table(rows)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
