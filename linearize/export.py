"""Write the student as an ordinary Hugging Face folder, and prove that what was written is what was trained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from linearize.adapters import merge_lora
from linearize.errors import LinearizeError, RunError
from linearize.modeling import STUDENT_CLASSES, student_config
from linearize.quantized import dequantize
from linearize.recipe import Recipe
from linearize.remote_code import FILE as REMOTE_CODE_FILE
from linearize.run_folder import read_json
from linearize.surgery import Graft, base_model_type
from linearize.teacher_files import HUB_ID, find_checkpoint, split_revision

PROBE_FILE = "probe.safetensors"
"""Logits of the trained student on a few tokens, for `linearize doctor` to compare a loaded one with."""

SHARD_SIZE = "4GB"
"""Of a weight file: one that breaks off on its way to the Hub is what has to be sent again."""

HEAD_ROWS = 8192
"""Of the vocabulary that the probe multiplies at a time."""


def export_student(graft: Graft, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path) -> None:
    """Merge the adapters and write the student: weights, config, tokenizer, recipe, code and probe.

    Written aside first and moved into `folder` file by file, config.json last: a folder with a config.json is whole.

    Args:
        graft: the trained student; by this call quantised base weights become plain ones, its adapters are merged into
            them, and those that were fp32 for training become what they were.

    Raises:
        RunError: when the disk is full or the folder cannot be written.
    """
    dequantize(graft.model)
    merge_lora(graft.model)
    graft.restore_dtypes()
    aside = folder / ".export"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        student = _as_student(graft, recipe)
        save_model(student, aside)
        tokenizer.save_pretrained(aside)
        save_file(probe(graft.model), aside / PROBE_FILE)
        (aside / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        written = {path.name for path in aside.iterdir()}
        for path in folder.glob("model*.safetensors*"):  # of an earlier export, in other shards
            if path.name not in written:
                path.unlink()
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:  # safetensors has its own word for a full disk
        raise RunError(
            f"the student could not be written: {error}",
            place=str(folder),
            remedy="Its last checkpoint is kept: free space or choose rights, then run again with --resume.",
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _as_student(graft: Graft, recipe: Recipe) -> PreTrainedModel:
    """The grafted model's own tensors, without a copy, in the student class that will be loaded later."""
    teacher = graft.model
    config_class, model_class = STUDENT_CLASSES[base_model_type(teacher)]
    config = student_config(teacher.config, recipe.mixer, tuple(sorted(graft.students)))
    config.dtype = teacher.dtype
    module = REMOTE_CODE_FILE.removesuffix(".py")
    config.auto_map = {
        "AutoConfig": f"{module}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }
    with torch.device("meta"):
        student = model_class(config)
    student.load_state_dict(teacher.state_dict(), assign=True)
    student.tie_weights()
    student.generation_config = teacher.generation_config
    return student


def save_model(student: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` without a progress bar, in shards; the tensors are written from where they lie."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        student.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@torch.no_grad()
def probe(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits of the last 4 of 96 fixed tokens, on up to 512 entries of the vocabulary.

    Returns:
        input_ids [1, 96] int64, entries [E] int64, logits [4, E] fp32.
    """
    generator = torch.Generator().manual_seed(20402)
    vocabulary: int = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, 96), generator=generator)
    entries = torch.randperm(vocabulary, generator=generator)[:512]
    return {"input_ids": ids, "entries": entries, "logits": probe_logits(model, ids, entries)}


@torch.no_grad()
def probe_logits(model: PreTrainedModel, ids: Tensor, entries: Tensor) -> Tensor:
    """Logits [4, E] in fp32 on the CPU."""
    training = model.training
    model.eval()
    with _head_in_pieces(model):
        logits = model(ids.to(model.device), use_cache=False, logits_to_keep=4).logits[0]
    model.train(training)
    return logits[:, entries.to(logits.device)].float().cpu().contiguous()


@contextmanager
def _head_in_pieces(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a plain head on the CPU multiplies a part of the vocabulary at a time.

    oneDNN repacks a bf16 matrix to multiply with it: for the head of a small model that is a fifth of all its weights.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.device.type != "cpu" or "forward" in vars(head):
        yield
        return

    def forward(x_BTD: Tensor) -> Tensor:
        biases = [None] * len(head.weight) if head.bias is None else head.bias.split(HEAD_ROWS)
        parts = zip(head.weight.split(HEAD_ROWS), biases, strict=False)
        return torch.cat([F.linear(x_BTD, rows, bias) for rows, bias in parts], dim=-1)

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def refuse_no_student(folder: str | Path) -> None:
    """Say so where no student can be: transformers would ask the Hub for a folder that is misspelt, for a minute.

    Raises:
        RunError: there is no such folder and the name is none of the Hub's, or the folder holds no model, or a damaged
            one.
    """
    path = Path(folder)
    if path.exists() and not (path / "config.json").is_file():
        began = (path / "run" / "run.json").is_file()
        problem = "holds no config.json" + (": its run has not ended" if began else "")
        raise RunError(problem, place=str(path), remedy="Give the --out folder of a finished run.")
    entry = read_json(path / "config.json").get("linearize")
    if entry is not None and not (isinstance(entry, dict) and {"format", "mixer", "layers"} <= entry.keys()):
        raise RunError(
            "the `linearize` entry does not hold format, mixer and layers",
            place=f"{path}, config.json",
            remedy="Copy or download config.json again.",
        )
    name, _ = split_revision(str(folder))
    if not path.exists() and (Path(name).exists() or not HUB_ID.fullmatch(name)):  # a folder has no revisions
        raise RunError("no such folder", place=str(path), remedy="Give the --out folder of a finished run.")


def _files_of(student: str | Path) -> Path:
    """The folder that holds a student; one on the Hub is fetched, and the Hub asked once, however many its files."""
    refuse_no_student(student)
    return Path(student) if Path(student).exists() else find_checkpoint(str(student)).folder


def load_student(folder: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a student and refuse one whose weights do not match its config: nothing is initialised silently.

    Args:
        folder: that holds it, or its Hub id: `owner/name` or `owner/name@revision`.
        dtype: of the weights; `"auto"` is that in which they were written.
        device: where they go.

    Raises:
        RunError: for a folder that holds no student, and for missing, unexpected or misshapen weights.
        TeacherError: there is no such folder, and the Hub has no such model or cannot be reached.
    """
    place = _files_of(folder)
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below instead
        )
    except LinearizeError as error:  # names the file, not where it lies
        raise type(error)(error.problem, place=f"{folder}, {error.place}", remedy=error.remedy) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(" ".join(str(error).split()), place=str(folder)) from None
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    model: PreTrainedModel
    model, info = loaded
    wrong = {what: sorted(map(str, names)) for what, names in info.items() if names}
    if wrong:
        raise RunError(
            f"its weights do not fit its config: {json.dumps(wrong)[:500]}",
            place=str(folder),
            remedy="Files of it may be missing or of another student: copy or download it again.",
        )
    return model.eval().to(torch.device(device))


def load_student_config(folder: str | Path) -> PreTrainedConfig:
    """The configuration of a student, or of another model.

    Raises:
        RunError: it cannot be found or read.
    """
    place = _files_of(folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise RunError(" ".join(str(error).split()), place=str(folder)) from None
    return config


def load_student_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a student.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    place = _files_of(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        problem = f"its tokenizer cannot be loaded: {' '.join(str(error).split())}"
        remedy = "Save the teacher's tokenizer into the folder with save_pretrained."
        raise RunError(problem, place=str(folder), remedy=remedy) from None
    return tokenizer
