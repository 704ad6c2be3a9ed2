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
from collections.abc import Iterator
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
from linearize.mixers import MIXERS, MixerEntry
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.pipeline import Conversion, convert
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
ids = AutoTokenizer.from_pretrained(sys.argv[1])("abc", return_tensors="pt")
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    print(json.dumps([type(model).__name__, tokens.shape[1]]))
"""


class Row(NamedTuple):
    """One family's cells, and whether all is well."""

    family: str
    plan: str
    exact: str
    converted: str
    reloaded: str
    doctor: str
    green: bool


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
    """Everything of one family."""
    model = tiny_teacher(family)
    planned = len(plan_surgery(model, HedgehogConfig()))
    worst = difference_of_ways(model, lambda: graft(model, plan_surgery(model, ExactConfig(), replace_sliding=True)))
    teacher = folder / "teacher"
    write_teacher(family, teacher)
    ratios, passed, all_checks, students = [], 0, 0, []
    for precision in PRECISIONS:
        job = Conversion(
            model=str(teacher),
            out=folder / precision,
            data=str(text),
            recipe="hedgehog",
            overrides=(*SHORT, f"precision={precision}"),
            device="cpu",
        )
        done = convert(job, Console(quiet=True))
        students.append(str(done.folder))
        ratios.append(done.student.perplexity["held-out"] / done.teacher.perplexity["held-out"])
        findings = examine_folder(done.folder)
        passed, all_checks = passed + sum(finding.passed for finding in findings), all_checks + len(findings)
    fresh = subprocess.run([sys.executable, "-c", _RELOAD, *students], capture_output=True, text=True, check=False)
    loaded = [json.loads(line) for line in fresh.stdout.splitlines()]
    whole = len(loaded) == len(students) and all(tokens == 7 for _, tokens in loaded)
    return Row(
        family,
        f"{planned} of {LAYERS}",
        f"{worst:.0e}",
        ", ".join(f"{ratio:.2f}" for ratio in ratios),
        f"`{loaded[0][0]}`" if whole else f"FAILED {fresh.stderr[-300:]}",
        f"{passed} of {all_checks}",
        worst <= TOLERANCE and whole and passed == all_checks,
    )


def rows(families: list[str]) -> Iterator[Row]:
    MIXERS["exact"] = MixerEntry(ExactConfig, Exact)
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            yield check(family, write_text(folder), folder)


def page(found: list[Row], command: str) -> str:
    """The table as markdown."""
    lines = [
        f"{date.today()}, transformers {transformers.__version__}, torch {torch.__version__}, CPU: `{command}`",
        "",
        "| family | plan | exact softmax | student / teacher, fp32, bf16 | reloaded as | doctor | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(f"| {' | '.join(row[:-1])} | {'ok' if row.green else '**FAILED**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, help="where the table goes; printed otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(options.families):
        print(*row, flush=True, file=sys.stderr)
        found.append(row)
    table = page(found, " ".join(["python", *sys.argv]))
    if options.out is None:
        print(table)
    else:
        options.out.write_text(table)
    return 0 if all(row.green for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
