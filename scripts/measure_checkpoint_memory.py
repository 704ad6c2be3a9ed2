"""Peak memory of loading a sharded checkpoint, grafting it and exporting the student, against the size of its weights.

    python scripts/measure_checkpoint_memory.py --shape 1b
    python scripts/measure_checkpoint_memory.py --shape 8b --work /big/disk

Random weights in bf16, written shard by shard; the disk needs room for them twice. Loading and exporting run in a
process of their own. Printed are that process's peak resident memory, what it holds after its imports and before it
loads anything, and (peak - imports) / weights, where `weights` are the bytes of the exported student. Resident memory
counts pages of mapped files; `anonymous` leaves them out: the kernel takes mapped pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.adapters import LoraSettings, add_lora
from linearize.export import export_student
from linearize.recipe import load_recipe
from linearize.surgery import graft, plan_surgery
from linearize.teacher import load_teacher

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 97},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Llama 3.2 1B and Llama 3.1 8B."""

SHARD = 4 * 2**30


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--recipe", default="lizard")
    parser.add_argument("--work", help="a folder for the checkpoints; default: a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(convert(Path(options.child), options.recipe)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        write_checkpoint(Path(work) / "teacher", options.shape)
        command = [sys.executable, __file__, "--child", work, "--recipe", options.recipe]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(json.dumps({"shape": options.shape, "recipe": options.recipe, **json.loads(done.stdout)}))


def write_checkpoint(folder: Path, shape: str) -> None:
    """A sharded checkpoint of random weights; no more than one shard is in memory."""
    folder.mkdir()
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weight_map, shard, held, number = {}, {}, 0, 0
    for index, (name, size) in enumerate(names.items()):
        shard[name] = torch.randn(size, dtype=torch.bfloat16).mul_(0.02)
        held += shard[name].nbytes
        weight_map[name] = f"model-{number:05d}.safetensors"
        if held > SHARD / 4 or index == len(names) - 1:
            save_file(shard, folder / weight_map[name], metadata={"format": "pt"})
            shard, held, number = {}, 0, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def convert(work: Path, recipe_name: str) -> dict[str, float]:
    """Load, graft, adapt, merge and export; bytes and ratios."""
    recipe = load_recipe(recipe_name)
    watch = Watch()
    before = watch.read()
    started = time.perf_counter()
    teacher = load_teacher(str(work / "teacher"), dtype=torch.bfloat16)
    loaded = watch.read()
    grafted = graft(teacher.model, plan_surgery(teacher.model, recipe.mixer))
    add_lora(grafted.model, LoraSettings())
    export_student(grafted, teacher.tokenizer, recipe, work / "student")
    peak, peak_anonymous = watch.stop()
    weights = sum(path.stat().st_size for path in (work / "student").glob("model*.safetensors"))
    shutil.rmtree(work / "student")
    return {
        "weights": weights,
        "imports": before[0],
        "loaded": loaded[0],
        "peak": peak,
        "ratio": round((peak - before[0]) / weights, 3),
        "ratio_anonymous": round((peak_anonymous - before[1]) / weights, 3),
        "seconds": round(time.perf_counter() - started, 1),
    }


class Watch:
    """Reads this process's memory every few milliseconds: resident, and anonymous alone."""

    def __init__(self) -> None:
        self.peaks = (0, 0)
        self.running = True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def read(self) -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        sizes = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))
        }
        return sizes["VmRSS"], sizes["RssAnon"]

    def _run(self) -> None:
        while self.running:
            now = self.read()
            self.peaks = max(self.peaks[0], now[0]), max(self.peaks[1], now[1])
            time.sleep(0.003)

    def stop(self) -> tuple[int, int]:
        self.running = False
        self.thread.join()
        return self.peaks


if __name__ == "__main__":
    main()
