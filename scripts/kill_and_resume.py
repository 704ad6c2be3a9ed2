"""Kill conversions with SIGKILL at random moments, resume each, and compare the end with an undisturbed run.

    python scripts/kill_and_resume.py --kills 50 --out /tmp/kills

A tiny random Llama, its tokenizer and a text are made in the output folder. One conversion runs undisturbed; then
conversions are killed and resumed until they finish, and new ones begun, until there were that many kills. Each kill
comes at a random time of the process's life, so it falls into reading, training, saving and exporting alike. Every
finished run must have the losses and the weights of the undisturbed one, bit for bit, and no kill may lose a checkpoint
that was whole before it.

Children are forks of this process, which has the libraries loaded, and run the command line from its start:
`--fresh` starts a new interpreter for each instead, which takes many times as long. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import linearize.pipeline  # noqa: F401  children are to have it loaded
from linearize.checkpoint import Checkpoint, load_latest
from linearize.cli import main as linearize_main
from linearize.metrics import TIMING_FIELDS, read_metrics

STAGES = ("length=32", "batch=2", "micro_batch=1", "tokens=1920")


def make_teacher(folder: Path) -> None:
    """Two layers of random weights, and a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0} | {char: place + 1 for place, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_text(file: Path) -> None:
    words = random.Random(0)
    lines = [" ".join(words.choices(["tide", "salt", "gull", "rope", "keel", "mast"], k=60)) for _ in range(60)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines), "utf-8")


@dataclass(frozen=True)
class Setting:
    """What all conversions share."""

    folder: Path
    save_every: float
    fresh: bool

    def words(self, out: Path) -> list[str]:
        """The command line; it goes on with a run that has begun."""
        sets = [f"stages.{stage}.{setting}" for stage in (0, 1) for setting in STAGES]
        sets += ["stages.1.lora.dropout=0.1", "heldout_tokens=128", "precision=fp32"]
        words = [
            "linearize",
            "convert",
            "--model",
            str(self.folder / "teacher"),
            "--data",
            str(self.folder / "text.jsonl"),
        ]
        words += ["--out", str(out), "--device", "cpu", "--save-every", str(self.save_every)]
        words += [word for setting in sets for word in ("--set", setting)]
        return [*words, "--resume"] if (out / "run" / "run.json").is_file() else words

    def start(self, out: Path) -> int:
        """Start a conversion in a process of its own; its number."""
        words = self.words(out)
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if self.fresh:
            command = [sys.executable, "-m", "linearize.cli", *words[1:]]
            child = subprocess.Popen(command, stdout=log, stderr=log)
            os.close(log)
            return child.pid
        child_number = os.fork()
        if child_number == 0:
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = words
            code: object = 1
            try:
                code = linearize_main()
            except SystemExit as ended:  # how typer ends
                code = ended.code
            finally:
                os._exit(code if isinstance(code, int) else 0)
        os.close(log)
        return child_number


def wait(child: int, seconds: float) -> int | None:
    """The exit status of a child if it ended within that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def place_of(found: Checkpoint | None) -> tuple[int, int]:
    return (-1, -1) if found is None else (found.state.stage_index, found.state.step)


def losses(out: Path) -> list[dict[str, object]]:
    records = read_metrics(out / "run" / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in records]


def differences(whole: Path, out: Path) -> list[str]:
    """In what two finished runs differ."""
    found = [] if losses(whole) == losses(out) else ["losses"]
    left, right = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    same = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    found += [] if same else ["weights"]
    one, two = (json.loads((folder / "metrics.json").read_text("utf-8"))["perplexity"] for folder in (whole, out))
    return found if one == two else [*found, "perplexities"]


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str]
    resumed: int = 0
    lost: int = 0
    differing: int = 0
    finished: int = 0


def what_it_did(out: Path) -> str:
    """Where the run in `out` was killed, as far as its folder tells."""
    if not (out / "run" / "run.json").is_file():
        return "before the run began"
    if list((out / "run").glob("checkpoints/.tmp-*")):
        return "while a checkpoint was written"
    if (out / ".export").exists() or (out / "model.safetensors").exists():
        return "while the student was exported or measured"
    metrics = out / "run" / "metrics.jsonl"
    return "while it trained" if metrics.is_file() and metrics.stat().st_size else "before the first step"


def disturb(setting: Setting, out: Path, tally: Tally, moment: Callable[[], float], kills: int) -> None:
    """Kill and resume one conversion until it finishes or there were enough kills; then let it finish."""
    acknowledged = (-1, -1)
    while True:
        child = setting.start(out)
        code = wait(child, moment() if tally.kills.total() < kills else 1e9)
        if code is not None:
            if code != 0:
                raise SystemExit(f"a conversion ended with exit code {code}; see {setting.folder / 'log.txt'}")
            return
        os.kill(child, signal.SIGSTOP)  # so that it writes nothing while its checkpoints are read
        saved = place_of(load_latest(out / "run"))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tally.kills[what_it_did(out)] += 1
        tally.resumed += 1
        acknowledged = max(acknowledged, saved)
        if place_of(load_latest(out / "run")) < acknowledged:
            tally.lost += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True, help="a folder for everything; deleted first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=0.0, help="seconds between checkpoints; 0 = every step")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every run")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    torch.set_num_threads(1)
    make_teacher(options.out / "teacher")
    make_text(options.out / "text.jsonl")
    setting = Setting(options.out, options.save_every, options.fresh)
    whole, tally, random_moment = options.out / "whole", Tally(Counter()), random.Random(options.seed)
    started = time.monotonic()
    if wait(setting.start(whole), 1e9) != 0:
        raise SystemExit(f"the undisturbed conversion failed; see {options.out / 'log.txt'}")
    lifetime = time.monotonic() - started
    print(f"undisturbed: {len(losses(whole))} steps in {lifetime:.1f} s", flush=True)
    while tally.kills.total() < options.kills:
        out = options.out / f"run{tally.finished}"
        disturb(setting, out, tally, lambda: random_moment.uniform(0, lifetime), options.kills)
        wrong = differences(whole, out)
        tally.finished, tally.differing = tally.finished + 1, tally.differing + bool(wrong)
        state = f"differs in {', '.join(wrong)}" if wrong else "identical losses, weights and perplexities"
        print(f"{out.name}: {state}; {tally.kills.total()} kills so far", flush=True)
    for place, count in tally.kills.most_common():
        print(f"  {count:3} {place}")
    print(
        f"{tally.kills.total()} kills, {tally.resumed} resumes, {tally.finished} runs finished, {tally.differing} "
        f"differing, {tally.lost} checkpoints lost; {time.monotonic() - started:.0f} s"
    )
    raise SystemExit(1 if tally.differing or tally.lost else 0)


if __name__ == "__main__":
    main()
