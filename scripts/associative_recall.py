"""Can a student recall what has left its window? Asked of a teacher small enough to know the answer.

    python scripts/associative_recall.py teacher --out recall
    python scripts/associative_recall.py train --out recall
    python scripts/associative_recall.py table --out recall  # the table of docs/results.md

Multi-query associative recall (arXiv 2312.04927): a document lists pairs of a key and a value, then asks for each key
once, in another order. `teacher` trains a Llama of two layers on it from nothing, until it recalls nearly all. `train`
converts that teacher by each recipe, with windows far shorter than a document, and counts what each student recalls.
Everything else is as users run it: `linearize.convert` on a folder and a text file. Minutes a row on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from linearize.attention import StudentAttention
from linearize.export import load_student
from linearize.job import Conversion
from linearize.machine import choose_machine, versions
from linearize.mixers.base import silenced
from linearize.pipeline import convert
from linearize.recipe import load_recipe

END = "<end>"
KEYS = VALUES = 32
PAIRS = (8, 16, 24)
"""Pairs a document: what a state has to hold. A document of N has 4 N tokens."""

WINDOW = 8
"""Keys that a windowed student sees exactly."""

FAR = 2 * WINDOW
"""Tokens from a pair to its question from which on no window has seen both, not even by way of a layer between."""

LEARNING_RATE, DOCUMENTS = 3e-3, 64
"""Of the teacher's training; documents of a step."""

LESSONS = (2, 4, *PAIRS)
"""Pairs a document, by turns: few at first sight are what makes it find out how to recall at all."""

REST = 0.1
"""Weight of all tokens but the answers. Nobody can know them, so they are mostly noise to the gradients."""

MEASURED = 256
"""Documents of each size that count."""


NARROW = (f"mixer.window={WINDOW}",)
NO_SINKS = ("mixer.sinks=0",)  # they would be the first pairs
ROWS: dict[str, tuple[str, ...]] = {
    "swa-sink": NARROW + NO_SINKS,
    "lizard": NARROW + NO_SINKS,
    "lolcats": NARROW,
    "liger": NARROW,
    "hedgehog": (),
    "lawcat": (),
    "mamba2-mimic": (),
    "gdn": (),
    "ahn": NARROW + NO_SINKS,
    "ahn-published": NARROW + NO_SINKS,
}
"""Recipes, and what of them is changed."""


def documents(number: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(number, 4 pairs) tokens, and (number, pairs) tokens from each question's key back to the pair's key.

    Token 0 ends a document and stands in none; 1 to KEYS are keys, the rest values.
    """
    keys_NP = torch.rand(number, KEYS, generator=generator).argsort(-1)[:, :pairs] + 1
    values_NP = torch.randint(KEYS + 1, KEYS + VALUES + 1, (number, pairs), generator=generator)
    order_NP = torch.rand(number, pairs, generator=generator).argsort(-1)
    listed = torch.stack([keys_NP, values_NP], -1)
    asked = torch.stack([keys_NP.gather(1, order_NP), values_NP.gather(1, order_NP)], -1)
    gap_NP = 2 * (pairs + torch.arange(pairs) - order_NP)
    return torch.cat([listed.flatten(1), asked.flatten(1)], 1), gap_NP


def train_teacher(options: argparse.Namespace) -> None:
    """Train the teacher, save it as any Hugging Face folder, and write the students' text."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=1 + KEYS + VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8 * max(PAIRS),
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    device = choose_machine(options.device, "fp32").device
    teacher = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=options.steps)
    for step in range(options.steps):
        pairs = LESSONS[step % len(LESSONS)]
        ids_BT = documents(DOCUMENTS, pairs, generator)[0].to(device)
        logits_BTV = teacher(ids_BT).logits
        loss_BT = F.cross_entropy(logits_BTV[:, :-1].mT, ids_BT[:, 1:], reduction="none")
        loss = loss_BT[:, 2 * pairs :: 2].mean() + REST * loss_BT.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, recalls {recall(teacher)}", flush=True)
    teacher.save_pretrained(options.out / "teacher")
    _tokenizer().save_pretrained(options.out / "teacher")
    with (options.out / "text.jsonl").open("w") as file:
        for number in range(options.documents):
            ids = documents(1, PAIRS[number % len(PAIRS)], generator)[0][0]
            file.write(json.dumps({"text": " ".join(map(_word, ids.tolist()))}) + "\n")
    _write(options.out / "teacher.json", {"recalls": recall(teacher)})


def _word(token: int) -> str:
    return END if token == 0 else f"k{token}" if token <= KEYS else f"v{token - KEYS}"


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({_word(token): token for token in range(1 + KEYS + VALUES)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, unk_token=END)


@torch.no_grad()
def recall(model: PreTrainedModel) -> dict[str, float]:
    """By the pairs of a document: the share of questions, FAR from their pairs, that get the right value."""
    generator, shares = torch.Generator().manual_seed(1), {}
    for pairs in PAIRS:
        ids_BT, gap_NP = documents(MEASURED, pairs, generator)
        logits_BTV = model(ids_BT.to(model.device), use_cache=False).logits
        answers_NP = logits_BTV[:, 2 * pairs :: 2].argmax(-1).cpu()
        right_NP = answers_NP == ids_BT[:, 2 * pairs + 1 :: 2]
        shares[str(pairs)] = right_NP[gap_NP >= FAR].float().mean().item()
    return shares


def train_rows(options: argparse.Namespace) -> None:
    """Convert by each recipe that is missing, and measure."""
    for name in options.row or ROWS:
        if not (options.out / f"{name}.json").is_file():
            train_row(name, options)


def train_row(name: str, options: argparse.Namespace) -> None:
    """Convert by one recipe, measure, and write the row's JSON file."""
    began, recipe = time.time(), load_recipe(name)
    settings = ("length=256", "batch=32", "micro_batch=32", f"tokens={options.tokens}")
    stages = [f"stages.{index}.{setting}" for index in range(len(recipe.stages)) for setting in settings]
    job = Conversion(
        model=str(options.out / "teacher"),
        recipe=name,
        out=options.out / name,
        data=str(options.out / "text.jsonl"),
        overrides=("evaluations=1", f"seed={options.seed}", *ROWS[name], *stages),
        device=options.device,
        overwrite=True,
    )
    machine = choose_machine(options.device, "fp32")
    student = load_student(convert(job).folder, dtype=machine.dtype, device=str(machine.device))
    mixers = [module.mixer for module in student.modules() if isinstance(module, StudentAttention)]
    record: dict[str, Any] = {
        "recalls": recall(student),
        "state_bytes": sum(mixer.state_bytes(machine.dtype) for mixer in mixers),
        "command": job.command(),
        "device": machine.name,
    }
    if recipe.mixer.window_beside_linear:
        with silenced(mixers, "linear"):
            record["recalls_without_linear"] = recall(student)
    _write(options.out / f"{name}.json", record | {"seconds": time.time() - began})


def _write(path: Path, record: dict[str, Any]) -> None:
    print(path.stem, record, flush=True)
    path.write_text(json.dumps(record | {"date": f"{datetime.now(UTC):%Y-%m-%d}", "versions": versions()}, indent=1))


def write_table(options: argparse.Namespace) -> None:
    """Print it as Markdown."""
    print(f"| | {' | '.join(f'{pairs} pairs' for pairs in PAIRS)} |\n|---|{'---|' * len(PAIRS)}")
    for name in ("teacher", *ROWS):
        if (path := options.out / f"{name}.json").is_file():
            record = json.loads(path.read_text())
            for key, label in (
                ("recalls", "teacher" if name == "teacher" else f"`{name}`"),
                ("recalls_without_linear", f"`{name}`, linear branch off"),
            ):
                if key in record:
                    print(f"| {label} | {' | '.join(f'{100 * share:.0f} %' for share in record[key].values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("teacher", "train", "table"))
    parser.add_argument("--out", type=Path, default=Path("recall"))
    parser.add_argument("--device", help="cpu, cuda; a GPU where there is one")
    parser.add_argument("--steps", type=int, default=1_000, help="of the teacher")
    parser.add_argument("--documents", type=int, default=120_000, help="of the students' text")
    parser.add_argument("--tokens", default="2M", help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the students")
    parser.add_argument("--row", action="append", choices=tuple(ROWS), help="only this row; may be repeated")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"teacher": train_teacher, "train": train_rows, "table": write_table}[options.do](options)


if __name__ == "__main__":
    main()
