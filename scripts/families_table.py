"""Table of all families: plan, exact softmax, conversion, reload, doctor. CPU, a few minutes, no network.

    python scripts/families_table.py --out docs/families.md

Every row is a tiny random teacher of that family (hidden 64, 3 layers; the sizes of tests/tiny_families.py). Columns:

- plan: student layers of all layers, as a recipe without `replace_sliding` would make them;
- exact softmax: largest difference of logits between the teacher and a student whose mixer is softmax attention
  written anew, every layer replaced; plain, padded and packed rows, fp32;
- convert: `linearize convert` with the recipe hedgehog on a few thousand tokens, in fp32 and in bf16: perplexity of the
  student over that of its teacher;
- reload: a fresh process loads the folder with AutoModelForCausalLM and generates; both precisions;
- doctor: checks passed; both precisions.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_families import LAYERS, Exact, ExactConfig, difference_of_ways, tiny_teacher

from linearize.doctor import examine_folder
from linearize.families import FAMILIES
from linearize.job import Conversion
from linearize.mixers import MIXERS, MixerEntry
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.pipeline import convert
from linearize.surgery import graft, plan_surgery

TOLERANCE = 1e-5
PRECISIONS = ("fp32", "bf16")
WORDS = ["tide", "salt", "gull", "rope", "keel", "mast", "reef", "sand"]
SHORT = (
    "stages.0.tokens=4k",
    "stages.1.tokens=4k",
    *(f"stages.{stage}.{key}" for stage in (0, 1) for key in ("length=64", "batch=8", "micro_batch=8")),
    "stages.1.lora.r=4",
    "heldout_tokens=512",
    "evaluations=1",
    "replace_sliding=true",
)
_RELOAD = """
import sys, json, linearize, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    ids = AutoTokenizer.from_pretrained(folder)("abc", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    print(json.dumps([type(model).__name__, str(model.dtype), tokens.shape[1]]), flush=True)
"""


class Row(NamedTuple):
    """One family's findings."""

    family: str
    planned: int
    difference: float
    ratios: tuple[float, ...]
    students: tuple[str, ...]  # their folders
    passed: int
    checks: int


def write_text(folder: Path) -> Path:
    """Random words in a random order that repeats, so that there is something to learn."""
    dice = random.Random(0)
    phrases = [" ".join(dice.choices(WORDS, k=8)) for _ in range(12)]
    lines = (json.dumps({"text": " ".join(dice.choices(phrases, k=12))}) for _ in range(200))
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines))
    return path


def write_teacher(family: str, folder: Path) -> None:
    """A folder as a user has it: weights, config and tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0} | {char: place + 1 for place, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    tiny_teacher(family, vocab_size=257, eos_token_id=0, bos_token_id=0).save_pretrained(folder)


def check(family: str, text: Path, folder: Path) -> Row:
    """Everything of one family but the reload."""
    model = tiny_teacher(family)
    planned = len(plan_surgery(model, HedgehogConfig()))
    worst = difference_of_ways(model, lambda: graft(model, plan_surgery(model, ExactConfig(), replace_sliding=True)))
    teacher = folder / "teacher"
    write_teacher(family, teacher)
    done = [
        convert(
            Conversion(
                model=str(teacher),
                out=folder / precision,
                data=str(text),
                recipe="hedgehog",
                overrides=(*SHORT, f"precision={precision}"),
                device="cpu",
            ),
            Console(quiet=True),
        )
        for precision in PRECISIONS
    ]
    findings = [finding for student in done for finding in examine_folder(student.folder)]
    return Row(
        family,
        planned,
        worst,
        tuple(student.student.perplexity["held-out"] / student.teacher.perplexity["held-out"] for student in done),
        tuple(str(student.folder) for student in done),
        sum(finding.passed for finding in findings),
        len(findings),
    )


def reload(rows: list[Row]) -> dict[str, tuple[str, str, int]]:
    """Class, dtype and tokens after 4 new ones of every student, by its folder; in a process of its own."""
    folders = [folder for row in rows for folder in row.students]
    fresh = subprocess.run([sys.executable, "-c", _RELOAD, *folders], stdout=subprocess.PIPE, text=True, check=False)
    return dict(zip(folders, map(json.loads, fresh.stdout.splitlines()), strict=False))


def page(rows: list[Row], loaded: dict[str, tuple[str, str, int]], command: str) -> tuple[str, bool]:
    """The table as markdown, and whether all of it is green."""
    lines = [
        f"{date.today()}, transformers {transformers.__version__}, torch {torch.__version__}, CPU: `{command}`",
        "",
        "| family | plan | exact softmax | student / teacher, fp32, bf16 | reloaded as | doctor | |",
        "|---|---|---|---|---|---|---|",
    ]
    all_green = True
    for row in rows:
        found = [loaded.get(folder, ("not loaded", "", 0)) for folder in row.students]
        whole = [(dtype, tokens) for _, dtype, tokens in found] == [("torch.float32", 7), ("torch.bfloat16", 7)]
        green = row.difference <= TOLERANCE and whole and row.passed == row.checks
        cells = (
            row.family,
            f"{row.planned} of {LAYERS}",
            f"{row.difference:.0e}",
            ", ".join(f"{ratio:.2f}" for ratio in row.ratios),
            f"`{found[0][0]}`",
            f"{row.passed} of {row.checks}",
            "ok" if green else "**FAILED**",
        )
        lines.append(f"| {' | '.join(cells)} |")
        all_green &= green
    return "\n".join(lines) + "\n", all_green


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, help="where the table goes; printed otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    MIXERS["exact"] = MixerEntry(ExactConfig, Exact)
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        text = write_text(folder)
        for family in options.families:
            rows.append(check(family, text, folder / family))
            print(rows[-1], flush=True, file=sys.stderr)
        table, green = page(rows, reload(rows), " ".join(["python", *sys.argv]))
    if options.out is None:
        print(table)
    else:
        options.out.write_text(table)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
