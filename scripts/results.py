"""The table of docs/results.md: every recipe trained on one text and measured on another, at several lengths.

    python scripts/results.py train --model teacher.gguf --data train.parquet --heldout heldout.parquet --out runs
    python scripts/results.py table --out runs  # the tables of docs/results.md

`train` works row by row, each in a process of its own and `--jobs` of them side by side, and writes one JSON file a
row. Rows that are there already are left alone, and half-trained ones go on. Training speeds are those of the
run, so they hold for that many jobs on one GPU. `table` reads the JSON files.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from linearize.attention import StudentAttention
from linearize.data import heldout_from
from linearize.evals.perplexity import perplexity
from linearize.export import load_student
from linearize.job import Conversion
from linearize.machine import choose_machine, versions
from linearize.mixers.base import silenced
from linearize.pipeline import convert
from linearize.recipe import load_recipe
from linearize.teacher import load_teacher

TEACHER = "teacher"
LENGTHS = (1024, 2048, 4096, 8192)
MEASURED_TOKENS = 32_768
"""Held-out tokens read per source and length."""

TABLE_NOTE = (
    "Over all held-out sources: exp of the mean difference of log-likelihoods. Tokens per second are those of training "
    "with other rows beside it on the GPU. State: the decoding state of one sequence, all layers, whatever its length."
)

TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Row:
    """A line of the table: a recipe, and what of it is changed."""

    recipe: str
    overrides: tuple[str, ...] = ()


ROWS: dict[str, Row] = {
    "swa-sink-64": Row("swa-sink"),
    "swa-sink-128": Row("swa-sink", ("mixer.window=128",)),
    "lizard": Row("lizard"),
    "lizard-64": Row("lizard", ("mixer.window=64",)),
    "lizard-published": Row("lizard-published"),
    "lolcats": Row("lolcats"),
    "lolcats-sinks": Row("lolcats", ("mixer.sinks=4",)),
    "liger": Row("liger"),
    "lawcat": Row("lawcat"),
    "hedgehog": Row("hedgehog"),
    "gdn": Row("gdn"),
    "ahn": Row("ahn"),
    "ahn-published": Row("ahn-published"),
    "mamba2-mimic": Row("mamba2-mimic"),
    "mmmamba": Row("mmmamba"),
    "mamba-in-llama": Row("mamba-in-llama"),
    "mohawk": Row("mohawk"),
}


def overrides_of(row: Row, tokens: str, micro_batch: int) -> list[str]:
    """`tokens` for distillation and as many for what comes before it, in equal parts; distillation in micro-batches."""
    stages = load_recipe(row.recipe).stages
    half = load_recipe(row.recipe, [f"stages.0.tokens={tokens}"]).stages[0].tokens
    before = sum(stage.kind == "transfer" for stage in stages)
    budget = [half // before if stage.kind == "transfer" else half for stage in stages]
    changes = [f"stages.{index}.tokens={number}" for index, number in enumerate(budget)]
    distil = [index for index, stage in enumerate(stages) if stage.kind == "distil"]
    return [*row.overrides, *changes, *(f"stages.{index}.micro_batch={micro_batch}" for index in distil)]


def train_row(name: str, options: argparse.Namespace) -> None:
    """Convert, measure, and write the row's JSON file."""
    began = time.time()
    record: dict[str, Any] = {"row": name, "date": f"{datetime.now(UTC):%Y-%m-%d}", "versions": versions()}
    machine = choose_machine(None, "auto")
    record["device"] = machine.name
    if name == TEACHER:
        teacher = load_teacher(options.model, dtype=machine.dtype, device=machine.device)
        heldout = heldout_from(options.heldout, None, teacher.tokenizer, MEASURED_TOKENS)
        record["nll"] = measure(teacher.model, heldout)
    else:
        row = ROWS[name]
        overrides = ["evaluations=1", *overrides_of(row, options.tokens, options.micro_batch)]
        folder = Path(options.out) / name
        job = Conversion(
            model=options.model,
            recipe=row.recipe,
            out=folder,
            data=options.data,
            heldout=options.heldout,
            overrides=overrides,
            resume=(folder / "run").is_dir(),
            compile=options.compile,
        )
        result = convert(job)
        recipe = load_recipe(row.recipe, overrides)
        record |= {
            "recipe": row.recipe,
            "mixer": recipe.mixer.model_dump(mode="json"),
            "keep_softmax": recipe.model_dump(mode="json")["keep_softmax"],
            "command": json.loads((result.folder / "metrics.json").read_text())["command"],
            "stages": [
                {key: stage[key] for key in ("name", "tokens", "seconds", "tokens_per_second")}
                for stage in result.stages
            ],
            "trained_seconds": time.time() - began,
        }
        student = load_student(result.folder, dtype=machine.dtype, device=str(machine.device))
        tokenizer = AutoTokenizer.from_pretrained(result.folder)
        heldout = heldout_from(options.heldout, None, tokenizer, MEASURED_TOKENS)
        layers = [module for module in student.modules() if isinstance(module, StudentAttention)]
        record["state_bytes"] = sum(layer.mixer.state_bytes(torch.bfloat16) for layer in layers)
        record["student_layers"] = len(layers)
        record["nll"] = measure(student, heldout)
        if recipe.mixer.window_beside_linear:
            with silenced([layer.mixer for layer in layers], "linear"):
                record["nll_without_linear"] = measure(student, heldout)
    record["seconds"] = time.time() - began
    (Path(options.out) / f"{name}.json").write_text(json.dumps(record, indent=1))


def measure(model: PreTrainedModel, heldout: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean negative log-likelihood by source and length."""
    found: dict[str, dict[str, float]] = {source: {} for source in heldout}
    for source, tokens in heldout.items():
        for length in LENGTHS:
            if tokens.size >= length:
                rows = max(1, TOKENS_AT_ONCE // length)
                measured = perplexity(model, tokens, length=length, max_tokens=MEASURED_TOKENS, batch_rows=rows)
                found[source][str(length)] = measured.nll
    return found


def train_rows(options: argparse.Namespace) -> int:
    """Start a process for each missing row, `jobs` at a time; the number of rows that failed."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in options.row or [TEACHER, *ROWS] if not (out / f"{name}.json").is_file()]

    def start(name: str) -> int:
        command = [sys.executable, __file__, "train", *sys.argv[2:], "--only", name]
        with (out / f"{name}.log").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
            if code and "--compile" in command:  # where the compiler fails, the row goes on without it
                command.remove("--compile")
                code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        print(f"{datetime.now(UTC):%H:%M:%S} {name}: {'done' if code == 0 else f'failed, see {name}.log'}", flush=True)
        return int(code != 0)

    with ThreadPoolExecutor(options.jobs) as pool:
        return sum(pool.map(start, missing))


def write_table(options: argparse.Namespace) -> None:
    """Print the Markdown page."""
    out = Path(options.out)
    names = [name for name in ROWS if (out / f"{name}.json").is_file()]
    records = {name: json.loads((out / f"{name}.json").read_text()) for name in [TEACHER, *names]}
    teacher = records[TEACHER]
    lines = [_heading(records), "", "### Perplexity of the student / perplexity of the teacher", ""]
    lines += [TABLE_NOTE, ""]
    lines += ["| row | 1K | 2K | 4K | 8K | transfer tokens/s | distil tokens/s | state |", "|---|" + "---|" * 7]
    for name in names:
        record = records[name]
        cells = [_rate(record["stages"], kind) for kind in ("transfer", "distil")]
        state = f"{record['state_bytes'] / 1e6:.2f} MB"
        lines.append(_line(name + _kept(record), _ratios(record["nll"], teacher["nll"]), [*cells, state]))
        if "nll_without_linear" in record:
            ratios = _ratios(record["nll_without_linear"], teacher["nll"])
            lines.append(_line(f"{name}, linear branch off", ratios, ["", "", ""]))
    for source in teacher["nll"]:
        lines += ["", f"### {source}", "", "| row | 1K | 2K | 4K | 8K |", "|---|" + "---|" * 4]
        absolute = [f"{math.exp(teacher['nll'][source][str(length)]):.2f}" for length in LENGTHS]
        lines.append(f"| teacher's perplexity | {' | '.join(absolute)} |")
        for name in names:
            lines.append(_line(name, _ratios(records[name]["nll"], teacher["nll"], source), []))
    print("\n".join(lines))


def _heading(records: dict[str, Any]) -> str:
    some = next(record for name, record in records.items() if name != TEACHER)
    packages = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
    return (
        f"## Tables\n\n{some['device']}, {some['date']}, {packages}. Made by `scripts/results.py`. An example of the "
        f"commands it runs:\n\n    {some['command']}"
    )


def _kept(record: dict[str, Any]) -> str:
    kept = record["keep_softmax"]
    if kept == "none":
        return ""
    return f" (every {kept['every']}nd layer softmax)" if kept == {"every": 2} else f" (softmax kept: {kept})"


def _rate(stages: list[dict[str, Any]], kind: str) -> str:
    """Tokens per second over all stages of this kind."""
    chosen = [stage for stage in stages if stage["name"] == kind]
    seconds = sum(stage["seconds"] for stage in chosen)
    return f"{sum(stage['tokens'] for stage in chosen) / seconds:,.0f}" if chosen else ""


def _ratios(student: dict[str, Any], teacher: dict[str, Any], source: str | None = None) -> list[float]:
    sources = [source] if source else list(teacher)
    return [
        math.exp(float(np.mean([student[name][str(length)] - teacher[name][str(length)] for name in sources])))
        for length in LENGTHS
    ]


def _line(name: str, ratios: list[float], others: list[str]) -> str:
    return f"| {' | '.join([name, *(f'{ratio:.2f}' for ratio in ratios), *others])} |"


def main() -> int:
    """Run one of the two commands; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "table"])
    parser.add_argument("--model", help="the teacher")
    parser.add_argument("--data", help="training text")
    parser.add_argument("--heldout", help="text to measure on")
    parser.add_argument("--out", default="runs", help="where the JSON files go")
    parser.add_argument("--tokens", default="3M", help="of the distillation, and of what comes before it")
    parser.add_argument("--row", action="append", help=f"one row, may be repeated; all: {', '.join(ROWS)}")
    parser.add_argument("--jobs", type=int, default=1, help="rows that are trained side by side")
    parser.add_argument("--compile", action="store_true", help="compile the mixers")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows per forward in distillation")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command == "table":
        write_table(options)
        return 0
    if options.only:
        train_row(options.only, options)
        return 0
    return train_rows(options)


if __name__ == "__main__":
    raise SystemExit(main())
