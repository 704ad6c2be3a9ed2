"""Plan conversions on many GPUs on paper, from one-GPU measurements: the tables of docs/scaling.md.

    python scripts/plan_scaling.py --measured docs/scaling-measured.json

No run on several GPUs is behind these numbers. Seconds of a micro-batch come from scripts/bench_engine.py, and grow
with FLOPs where a shape was not measured; memory is what `linearize plan --predict` says; links are assumptions. The
formulas and the numbered assumptions stand in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from linearize.memory import Target, predict_memory
from linearize.recipe import load_recipe

COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, LlamaConfig] = {
    "llama-1b": LlamaConfig(**COMMON, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                            num_attention_heads=32, head_dim=64, tie_word_embeddings=True),
    "llama-8b": LlamaConfig(**COMMON, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                            num_attention_heads=32, tie_word_embeddings=False),
    "llama-70b": LlamaConfig(**COMMON, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                             num_attention_heads=64, tie_word_embeddings=False),
}  # fmt: skip
PASSES = {"transfer": (1, 0), "distil": (4, 3)}
"""Products with the layers' weights (teacher, student, again, backward); with the head (teacher, student, backward)."""
GATHERS = {"transfer": 1, "distil": 3}
"""How often a micro-batch needs each layer's weights brought: teacher; student; backward pass, recomputing included."""
WAYS = {"transfer": ("data", "layers", "fsdp", "streamed"), "distil": ("data", "fsdp", "streamed")}
PER_HOST, INSIDE, BETWEEN, HOST = 8, 350e9, 45e9, 50e9
"""GPUs of a host; bytes a second: to GPUs of one host, to other hosts, from host memory. Assumptions, all four."""
ROOM = 75 * 2**30
"""Bytes of an 80 GB card that training may take; the rest is CUDA's, NCCL's, and lost between allocations."""


@dataclass(frozen=True)
class Work:
    """One stage of one shape on one GPU: what the formulas start from. `seconds` and `tokens` are a micro-batch's."""

    name: str
    config: LlamaConfig
    stage: str
    seconds: float
    tokens: int
    moments: int  # bytes of AdamW's, fp32 like the gradients: twice those
    peak: int  # bytes on one GPU
    peak_streamed: int
    layer: int  # bytes of one layer's weights
    element: int = 2  # bytes of a number in weights and hidden states

    @property
    def layers_bytes(self) -> int:
        layers: int = self.config.num_hidden_layers
        return layers * self.layer


@dataclass(frozen=True)
class Estimate:
    """One step on N GPUs. `sent` is the bytes each GPU sends a step; seconds with all, and with none, of it hidden."""

    sent: float
    link: float
    fastest: float
    slowest: float
    memory: float


def layer_weights(config: LlamaConfig) -> int:
    """Parameters of a decoder layer's matrices."""
    width, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    return int(width * config.head_dim * 2 * (heads + keys) + 3 * width * config.intermediate_size)


def flops(config: LlamaConfig, stage: str, length: int) -> float:
    """Of one token: products with the frozen weights, and the teacher's attention over the whole row."""
    layers, head = PASSES[stage]
    attention = 4 * length * config.num_attention_heads * config.head_dim
    matrices = 2 * layers * layer_weights(config)
    return config.num_hidden_layers * (matrices + attention) + 2 * head * config.hidden_size * config.vocab_size


def seconds_of(measured: dict[tuple[str, str], float], shape: str, stage: str, length: int) -> float:
    """Of a micro-batch: as measured, or from the largest smaller shape that was, by FLOPs."""
    base = next(name for name in reversed(list(SHAPES)[: list(SHAPES).index(shape) + 1]) if (name, stage) in measured)
    return measured[base, stage] * flops(SHAPES[shape], stage, length) / flops(SHAPES[base], stage, length)


def estimate(work: Work, way: str, count: int, each: int) -> Estimate:
    """A step of `each` micro-batches a GPU: `each` × N in all."""
    config, speed = work.config, INSIDE if count <= PER_HOST else BETWEEN
    gradients = 2 * (count - 1) / count * work.moments / 2  # a ring's all-reduce
    shard = (count - 1) / count * work.layers_bytes
    kept = work.moments / 2 if each > 1 or way == "layers" else 0.0  # gradients of the micro-batches before
    alone, brought = each * work.seconds, float(each * GATHERS[work.stage])
    if way == "layers":
        layers, sent = config.num_hidden_layers, config.hidden_size * work.tokens * work.element
        turn = work.seconds * math.ceil(layers / count) / layers
        turns, link = each * count + count - 1, sent / speed
        memory = work.peak - work.moments + (work.moments + kept) / count
        return Estimate(each * count * sent, turns * link, turns * turn, turns * (turn + link), memory)
    update = gradients / speed
    if way == "data":
        return Estimate(gradients, update, alone + update, alone + update, work.peak + kept)
    if way == "fsdp":
        if work.stage == "distil":  # FSDP2 looks ahead past the first layer's backward, to the teacher's last layer
            brought += each / config.num_hidden_layers
        link = brought * shard / speed
        memory = work.peak + kept - shard + 3 * work.layer
        sent = gradients + brought * shard
        return Estimate(sent, link + update, max(alone, link) + update, alone + link + update, memory)
    link = brought * work.layers_bytes / HOST
    return Estimate(gradients, update, max(alone, link) + update, alone + link + update, work.peak_streamed + kept)


def obstacle(work: Work, way: str, found: Estimate, count: int) -> str | None:
    """Why it cannot be."""
    if way == "layers" and count > work.config.num_hidden_layers:
        return "more GPUs than layers"
    return "does not fit" if found.memory > ROOM else None


def works(measured: dict[tuple[str, str], float], rows: int, length: int) -> Iterator[Work]:
    """What the plan needs of every shape and stage, memory by linearize's own model."""
    recipe = load_recipe("hedgehog")
    size: dict[str, Any] = {"length": length, "batch": rows, "micro_batch": rows}
    stages = [stage.model_copy(update=size) for stage in recipe.stages]
    stages = [s.model_copy(update={"checkpoint_activations": True}) if s.kind == "distil" else s for s in stages]
    recipe = recipe.model_copy(update={"stages": tuple(stages)})
    for shape in ("llama-8b", "llama-70b"):
        config = SHAPES[shape]
        whole, streamed = (predict_memory(config, recipe, Target(streamed=streamed)) for streamed in (False, True))
        for memory, less in zip(whole, streamed, strict=True):
            seconds = seconds_of(measured, shape, memory.name, length)
            moments, layer = memory.terms["AdamW moments"], 2 * (layer_weights(config) + 2 * config.hidden_size)
            yield Work(shape, config, memory.name, seconds, rows * length, moments, memory.peak, less.peak, layer)


def span(found: Estimate, show: Callable[[float], str]) -> str:
    """Of the step's seconds with all, and with none, of the exchange hidden."""
    return "–".join(dict.fromkeys([show(found.fastest), show(found.slowest)]))


def table(work: Work, each: int, counts: list[int], budget: float) -> Iterator[str]:
    yield f"\n**{work.name}, {work.stage}**, {each} micro-batch{'es' * (each > 1)} a GPU and step\n"
    yield "| split | N | tokens a step | sent a GPU and step | link, s | step, s | efficiency | GiB a GPU | hours |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for way in WAYS[work.stage]:
        for count in counts:
            found, tokens = estimate(work, way, count, each), each * count * work.tokens
            why = obstacle(work, way, found, count)
            cells = [
                span(found, lambda s: f"{s:.2f}"),
                span(found, lambda s: f"{each * work.seconds / s:.0%}"),
                f"{found.memory / 2**30:.1f}",
                span(found, lambda s, tokens=tokens: f"{budget / tokens * s / 3600:.1f}"),
            ]
            start = [way, str(count), f"{tokens / 1e6:.2f}M", f"{found.sent / 1e9:.2f} GB", f"{found.link:.3f}"]
            yield "| " + " | ".join([*start, *(["", "", cells[2], why] if why else cells)]) + " |"
            if why and way != "fsdp":  # only shards get smaller
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="JSON of scripts/bench_engine.py")
    parser.add_argument("--processes", default="8,16,32,64")
    parser.add_argument("--tokens", type=float, default=1e9, help="of each stage, for the hours")
    options = parser.parse_args()
    content = json.loads(options.measured.read_text(encoding="utf-8"))
    rows, length = 8, 2048
    endings = {f"{shape} T={length} B={rows} recomputed": shape for shape in SHAPES}
    measured = {(endings[r["case"]], r["what"]): r["seconds"] for r in content["rows"] if r["case"] in endings}
    counts = [int(count) for count in options.processes.split(",")]
    print(f"Measured: {content['facts']['device']}, {content['facts']['date'][:10]}. B={rows}, T={length}, hedgehog.\n")
    planned = list(works(measured, rows, length))
    print("| shape | stage | seconds a micro-batch | from | peak, GiB | streamed, GiB | layers, GB | gradients, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for work in planned:
        origin = "measured" if (work.name, work.stage) in measured else "FLOPs"
        sizes = (work.peak / 2**30, work.peak_streamed / 2**30, work.layers_bytes / 1e9, work.moments / 2e9)
        cells = [work.name, work.stage, f"{work.seconds:.3f}", origin, *(f"{size:.2f}" for size in sizes)]
        print("| " + " | ".join(cells) + " |")
    for work in planned:
        for each in (1, 20):
            if each == 1 or (work.stage == "transfer" and work.name == "llama-8b"):
                print("\n".join(table(work, each, counts, options.tokens)))


if __name__ == "__main__":
    main()
